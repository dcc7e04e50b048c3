"""Shares of the weights with adapters and in 4 bits, and adapters on fused experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.config import Config
from fastpref.model.coverage import announce_coverage
from fastpref.model.lora import as_reference
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers import odd_checkpoints
from tests.helpers.adapted import (
    close,
    logps_of,
    plain_logps,
    rewards,
    save_adapter,
    some_batch,
    trained,
)
from tests.helpers.policies import policy_of

MakeConfig = Callable[..., Config]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> str:
    """Two layers, each with 4 · 16 · 16 weights in linear layers of attention, and experts."""
    folder = tmp_path_factory.mktemp("models") / "gpt_oss"
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return str(odd_checkpoints.save(folder, "gpt_oss", tiny_llama, **options))


def notes(config: Config) -> list[str]:
    said: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(config.model.path or "")
    announce_coverage(policy_of(config, tokenizer), config.adapter, said.append)
    return said


def on(make_config: MakeConfig, model: str, **adapter: Any) -> Config:
    settings = {"name": "lora", "r": 2, **adapter}
    return make_config(model={"path": model, "dtype": "float32"}, adapter=settings)


def test_weights_without_adapters_are_named(make_config: MakeConfig, gpt_oss: str) -> None:
    """1,024 of 1,024 + 4 · (16 · 48 + 24 · 16) + 4 · 16 = 5,696 weights of a layer."""
    advice = "; adapter.target_modules adds linear layers, adapter.target_parameters the others"
    assert notes(on(make_config, gpt_oss)) == [
        "note: adapters cover 18% of the weights of the layers, and not mlp.experts.gate_up_proj, "
        f"mlp.experts.down_proj, mlp.router{advice}"
    ]
    assert notes(on(make_config, gpt_oss, target_parameters=EXPERTS)) == []


def test_a_covered_model_needs_no_note(make_config: MakeConfig, tiny_llama: str) -> None:
    assert notes(on(make_config, tiny_llama)) == []
    assert notes(make_config()) == []
    (note,) = notes(on(make_config, tiny_llama, target_modules=["q_proj"]))
    assert note.startswith("note: adapters cover 11% of the weights of the layers, and not mlp.")


def test_weights_in_more_than_4_bits_are_named(make_config: MakeConfig, gpt_oss: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = {"target_parameters": EXPERTS, "quantize": "nf4"}
    assert notes(on(make_config, gpt_oss, **options)) == [
        "note: adapter.quantize stores 18% of the weights of the layers in 4 bits, and "
        "mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.router in float32, since they are "
        "not in linear layers"
    ]


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "alone"])
def test_adapters_on_experts_are_trained_and_exported(
    make_config: MakeConfig, display: Display, gpt_oss: str, merge: bool
) -> None:
    config = make_config(
        model={"path": gpt_oss, "dtype": "float32"},
        adapter={"name": "lora", "r": 2, "target_parameters": EXPERTS, "merge": merge},
        training__steps=2,
        training__activation_checkpointing="full",
        optim__lr=1e-2,
    )
    trainer = trained(config, display)
    first, second = rewards(config)
    assert first == [0.0, 0.0] and second[0] != 0.0
    parameters = trainer.policy.trainable_parameters()
    on_experts = {n: p for n, p in parameters.items() if "experts" in n}
    assert len(on_experts) == 2 * 2 * 2  # layers, weights, matrices
    assert all(parameter.abs().sum() > 0 for parameter in on_experts.values())
    trainer.policy.layout = "padded"
    batch = some_batch(config, AutoTokenizer.from_pretrained(gpt_oss))
    ours = logps_of(trainer.policy.eval(), batch)
    folder = trainer.export()
    base = AutoModelForCausalLM.from_pretrained(folder if merge else gpt_oss)
    exported = base if merge else peft.PeftModel.from_pretrained(base, str(folder))
    close(plain_logps(exported.eval(), batch), ours)
    with as_reference(trainer.policy):
        reference = logps_of(trainer.policy, batch)
    close(reference, plain_logps(AutoModelForCausalLM.from_pretrained(gpt_oss).eval(), batch))


def test_gradients_of_adapters_on_experts_are_those_of_the_merged_weights(
    make_config: MakeConfig, gpt_oss: str
) -> None:
    """dL/dB of W + s B A, from dL/dW of a model whose weights are trained."""
    config = on(make_config, gpt_oss, target_parameters=["experts.down_proj"], target_modules=[])
    tokenizer = AutoTokenizer.from_pretrained(gpt_oss)
    policy, batch = policy_of(config, tokenizer), some_batch(config, tokenizer)
    plain = policy_of(config.model_copy(update={"adapter": None}), tokenizer)
    for model in (policy, plain):
        (model(batch).logps * torch.linspace(-1, 1, 12)).sum().backward()
    for block, plain_block in zip(policy.blocks(), plain.blocks(), strict=True):
        layer: Any = block.mlp.experts
        gradient = plain_block.mlp.experts.down_proj.grad  # (experts, in, out)
        a = layer.lora_A["default"].weight.view(4, 2, 24)  # (experts, r, in)
        expected = torch.einsum("eri,eio->ore", a, gradient) * layer.scaling["default"]
        actual = layer.lora_B["default"].weight.grad.view(16, 2, 4)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_parameters": ["experts.up"]},
            "adapter.target_parameters: GptOssForCausalLM has no weight experts.up; write the end",
        ),
        (
            {"target_parameters": EXPERTS, "dropout": 0.1},
            "adapter.dropout: adapters on weights outside linear layers, such as fused experts, "
            "cannot have it; remove it, or leave these weights out of adapter.target_modules",
        ),
        ({"target_parameters": EXPERTS, "dora": True}, "adapter.dora: adapters on weights outside"),
    ],
)
def test_adapters_that_experts_cannot_have(
    make_config: MakeConfig, gpt_oss: str, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        notes(on(make_config, gpt_oss, **adapter))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "alone"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_biases_of_adapters_are_merged_or_refused_at_the_start(
    make_config: MakeConfig,
    display: Display,
    tiny_llama: str,
    tmp_path: Path,
    kind: str,
    merge: bool,
) -> None:
    """The layers of GPT-2 have biases, those of Llama none."""
    base, target = tiny_llama, "q_proj"
    if kind == "gpt2":
        folder = odd_checkpoints.save(tmp_path / "gpt2", "gpt2", tiny_llama, n_positions=256)
        base, target = str(folder), "c_attn"
    path = save_adapter(tmp_path / "sft", base, target_modules=[target], lora_bias=True)
    config = make_config(
        model={"path": base, "dtype": "float32"},
        adapter={"name": "lora", "path": path, "merge": merge},
        training__steps=1,
    )
    if kind == "llama" and merge:
        with pytest.raises(ModelError) as caught:
            trained(config, display)
        assert str(caught.value) == (
            "adapter.path: the adapter of model.layers.0.self_attn.q_proj.weight has a bias "
            "(lora_bias), and the layer has none to merge it into; set adapter.merge=false"
        )
        return
    trainer = trained(config, display)
    trainer.policy.layout = "padded"
    batch = some_batch(config, AutoTokenizer.from_pretrained(base))
    ours = logps_of(trainer.policy.eval(), batch)
    exported: Any = AutoModelForCausalLM.from_pretrained(trainer.export() if merge else base)
    if not merge:
        exported = peft.PeftModel.from_pretrained(exported, str(trainer.export()))
    close(plain_logps(exported.eval(), batch), ours)
