"""4-bit base models: log-probs, gradients, export and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.model.policy import Policy
from fastpref.model.reference_policy import weights_sha256
from fastpref.utils import optional_packages
from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import MissingPackage
from fastpref.utils.progress import Display
from tests.helpers.adapted import (
    close,
    logps_of,
    plain_logps,
    rewards,
    save_adapter,
    some_batch,
    trained,
)
from tests.helpers.data import LLAMA
from tests.helpers.policies import policy_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
QLORA = {"name": "lora", "r": 4, "quantize": "nf4"}
RANDOM = {"init": "random", "config": {**LLAMA, "initializer_range": 0.2}, "dtype": "float32"}


def layers_in_4bit(policy: Policy) -> list[str]:
    return [n for n, m in policy.base.named_modules() if isinstance(m, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("model", [{}, {"model": RANDOM}], ids=["pretrained", "random"])
def test_the_linear_layers_are_in_4_bits_and_the_rest_is_not(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, model: dict[str, Any]
) -> None:
    policy = policy_of(make_config(adapter=QLORA, **model), tokenizer, CPU)
    assert policy.quantized and len(layers_in_4bit(policy)) == 2 * 7
    packed = {n for n, p in policy.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7 and not any("lm_head" in n or "embed" in n for n in packed)
    assert {p.dtype for n, p in policy.named_parameters() if n not in packed} == {torch.float32}
    assert all("lora_" in name for name in policy.trainable_parameters())
    assert not policy_of(make_config(adapter={"name": "lora"}), tokenizer, CPU).quantized


def test_bf16_computes_in_bf16_with_adapters_in_fp32(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = {"init": "random", "config": {**LLAMA, **small}, "dtype": "bfloat16"}
    policy = policy_of(make_config(adapter=QLORA, model=model), tokenizer, CPU)
    layer: Any = policy.base.get_submodule(layers_in_4bit(policy)[0])
    assert layer.compute_dtype == torch.bfloat16
    assert policy.base.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}


def plain_twin(policy: Policy, config: Config, tokenizer: PreTrainedTokenizerFast) -> Policy:
    """Policy with the same adapter on plain linear layers with the dequantized weights."""
    plain = config.model_copy(
        update={"adapter": config.adapter and config.adapter.model_copy(update={"quantize": None})}
    )
    twin = policy_of(plain, tokenizer, CPU)
    modules = dict(twin.base.named_modules())
    for name in layers_in_4bit(policy):
        weight: Any = policy.base.get_submodule(name).weight
        wide = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert (wide - modules[name].weight).abs().max() > 1e-3
        modules[name].weight.data.copy_(wide)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
            twin.trainable_parameters()[name].copy_(parameter)
    return twin


@pytest.mark.parametrize("dora", [False, True])
def test_log_probs_and_gradients_are_those_of_the_dequantized_model(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, dora: bool
) -> None:
    config = make_config(adapter={**QLORA, "dora": dora})
    policy, batch = policy_of(config, tokenizer, CPU), some_batch(config, tokenizer)
    with torch.no_grad():
        policy.eval()(batch)  # inference first must not change the gradients
    policy.train()
    twin = plain_twin(policy, config, tokenizer)
    for model in (policy, twin):
        (model(batch).logps * torch.linspace(-1, 1, 12)).sum().backward()
    close(logps_of(policy, batch), logps_of(twin, batch))
    others = twin.trainable_parameters()
    for name, parameter in policy.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_export_is_a_plain_model(
    make_config: MakeConfig, display: Display, tokenizer: PreTrainedTokenizerFast, dora: bool
) -> None:
    config = make_config(adapter={**QLORA, "dora": dora}, training__steps=2, optim__lr=1e-2)
    trainer, batch = trained(config, display), some_batch(config, tokenizer)
    first, second = rewards(config)
    assert first == [0.0, 0.0] and second[0] != 0.0
    ours = logps_of(trainer.policy.eval(), batch)
    folder = trainer.export()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert {type(m) for n, m in exported.named_modules() if "proj" in n} == {torch.nn.Linear}
    close(plain_logps(exported, batch), ours)


def test_an_adapter_is_trained_on_over_4_bits(
    make_config: MakeConfig, display: Display, tiny_llama: str, tmp_path: Path
) -> None:
    path = save_adapter(tmp_path / "sft", tiny_llama)
    adapter = {"name": "lora", "path": path, "quantize": "nf4"}
    config = make_config(adapter=adapter, reference="adapter", training__steps=2, optim__lr=1e-2)
    trained(config, display)
    first, second = rewards(config)
    assert first == [0.0, 0.0] and second[0] != 0.0


def test_the_cached_reference_knows_4_bits(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, twin, plain = (
        weights_sha256(policy_of(make_config(adapter=adapter), tokenizer, CPU))
        for adapter in (QLORA, QLORA, {"name": "lora", "r": 4})
    )
    assert first == twin and first != plain


@pytest.fixture(scope="module")
def in_4bit(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """The tiny Llama as bitsandbytes saves it."""
    folder = tmp_path_factory.mktemp("models") / "4bit"
    shutil.copytree(tiny_llama, folder)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=options, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def test_a_model_that_is_in_4_bits_already(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, in_4bit: Path
) -> None:
    model = {"path": str(in_4bit), "dtype": "float32"}
    config = make_config(adapter=QLORA, model=model)
    policy, batch = policy_of(config, tokenizer, CPU), some_batch(config, tokenizer)
    assert policy.quantized and len(layers_in_4bit(policy)) == 2 * 7
    theirs = AutoModelForCausalLM.from_pretrained(in_4bit, device_map={"": "cpu"})
    theirs = theirs.dequantize(torch.float32)  # overrides the bf16 of its config
    close(logps_of(policy, batch), plain_logps(theirs, batch))
    with pytest.raises(
        ModelError, match=r"is quantized, and only an adapter .* set adapter\.quant"
    ):
        policy_of(make_config(adapter="lora", model=model), tokenizer, CPU)


def test_what_is_refused(
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(kind: type[Exception], match: str, **change: Any) -> None:
        with pytest.raises(kind, match=match):
            policy_of(make_config(adapter=QLORA, **change), tokenizer, CPU)

    refused(ModelError, "nf4 computes in bfloat16 or float32", model__dtype="float64")
    other = tmp_path / "gptq"
    shutil.copytree(tiny_llama, other)
    described = json.loads((other / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(described))
    model = {"path": str(other), "dtype": "float32"}
    refused(ModelError, r"is quantized \(gptq\), which is not supported", model=model)
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    refused(MissingPackage, "quantize: nf4 needs bitsandbytes; pip install bitsandbytes")
