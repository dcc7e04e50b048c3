"""New and loaded adapters: log-probs, reference, export and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref.config import Config, ConfigError
from fastpref.model.lora import as_reference
from fastpref.model.reference_policy import weights_sha256
from fastpref.utils.errors import ModelError
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

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def sft(tmp_path: Path, tiny_llama: str) -> str:
    return save_adapter(tmp_path / "sft", tiny_llama, use_rslora=True, lora_dropout=0.5)


def with_peft(base: str, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_a_loaded_adapter_is_peft_s(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, sft: str
) -> None:
    config = make_config(adapter={"name": "lora", "path": sft})
    policy, batch = policy_of(config, tokenizer, CPU), some_batch(config, tokenizer)
    expected = plain_logps(with_peft(tiny_llama, sft), batch)
    close(logps_of(policy.eval(), batch), expected)
    base = plain_logps(AutoModelForCausalLM.from_pretrained(tiny_llama), batch)
    assert (expected - base).abs().max() > 0.1
    names = policy.trainable_parameters()
    assert len(names) == 8 and all("lora_" in name and ".default." in name for name in names)


@pytest.mark.parametrize("reference", ["cached", "frozen", "adapter"])
def test_the_reference_is_the_adapter_as_it_was_loaded(
    make_config: MakeConfig,
    display: Display,
    tokenizer: PreTrainedTokenizerFast,
    tiny_llama: str,
    tmp_path: Path,
    reference: str,
) -> None:
    path = save_adapter(tmp_path / "sft", tiny_llama)
    adapter = {"name": "lora", "path": path}
    config = make_config(adapter=adapter, reference=reference, training__steps=2, optim__lr=1e-2)
    trainer = trained(config, display)
    first, second = rewards(config)
    assert first == [0.0, 0.0] and second[0] != 0.0
    batch = some_batch(config, tokenizer)
    expected = plain_logps(with_peft(tiny_llama, path), batch)
    assert (logps_of(trainer.policy, batch) - expected).abs().max() > 0.1
    output = trainer.run.train.reference(batch)
    assert output is not None
    close(output.logps.double(), expected)


def test_dropout_is_the_policy_s_alone(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, sft: str
) -> None:
    config = make_config(adapter={"name": "lora", "path": sft}, reference="adapter")
    policy, batch = policy_of(config, tokenizer, CPU), some_batch(config, tokenizer)
    expected = plain_logps(with_peft(tiny_llama, sft), batch)
    assert policy.training
    with as_reference(policy):
        close(logps_of(policy, batch), expected)
        assert not policy.trainable_parameters()
    assert (logps_of(policy, batch) - expected).abs().max() > 0.1
    assert len(policy.trainable_parameters()) == 8


@pytest.mark.parametrize("reference", ["cached", "frozen", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_of_dora_begin_at_zero(
    make_config: MakeConfig, display: Display, dtype: str, reference: str
) -> None:
    """In bf16 the norms are rounded, so a new adapter does not exactly give the base model."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values = {**LLAMA, **small, "initializer_range": 0.3}
    config = make_config(
        model={"init": "random", "config": values, "dtype": dtype},
        adapter={"name": "lora", "r": 2, "dora": True},
        reference=reference,
        training__steps=1,
        training__batch_size=2,
    )
    trainer = trained(config, display)
    assert rewards(config) == [[0.0, 0.0]]
    assert any("lora_magnitude_vector" in name for name in trainer.policy.trainable_parameters())


def test_the_scale_of_rslora(make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against x Wᵀ + α/√r · (x Aᵀ) Bᵀ."""
    adapter = {"name": "lora", "r": 4, "alpha": 6, "rslora": True, "target_modules": ["q_proj"]}
    policy = policy_of(make_config(adapter=adapter), tokenizer, CPU)
    layer = policy.blocks()[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, 32)
    expected = x @ (layer.base_layer.weight + 6 / 2 * (b @ a)).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["fresh", "dora", "loaded"])
def test_exports_load_in_peft_and_merged_in_transformers(
    make_config: MakeConfig,
    display: Display,
    tokenizer: PreTrainedTokenizerFast,
    tiny_llama: str,
    sft: str,
    kind: str,
) -> None:
    adapter = {"fresh": {"r": 4}, "dora": {"r": 4, "dora": True}, "loaded": {"path": sft}}[kind]
    logps = {}
    for merge in (True, False):
        config = make_config(
            adapter={"name": "lora", "merge": merge, **adapter},
            reference="adapter",
            training__steps=2,
            training__output_dir=make_config().training.output_dir + str(merge),
            optim__lr=1e-2,
        )
        trainer = trained(config, display)
        batch = some_batch(config, tokenizer)
        ours = logps_of(trainer.policy.eval(), batch)
        folder = trainer.export()
        if merge:
            exported = AutoModelForCausalLM.from_pretrained(folder)
        else:
            assert not [path for path in folder.iterdir() if path.is_dir()]  # no reference
            exported = with_peft(tiny_llama, str(folder))
            assert exported.peft_config["default"].base_model_name_or_path == tiny_llama
        close(plain_logps(exported, batch), ours)
        logps[merge] = ours
    assert torch.equal(logps[True], logps[False])


def test_a_run_from_an_adapter_resumes(
    make_config: MakeConfig, display: Display, tiny_llama: str, sft: str
) -> None:
    """The reference stays the adapter of the folder, whatever the checkpoint holds."""
    output = make_config().training.output_dir
    options = {"adapter": {"name": "lora", "path": sft}, "reference": "adapter"}
    options["training__checkpoint_every"] = 1
    expected = trained(
        make_config(training__steps=4, training__output_dir=f"{output}-whole", **options), display
    )
    trained(make_config(training__steps=2, **options), display)
    config = make_config(training__steps=4, resume="auto", **options)
    resumed = trained(config, display).policy.state_dict()
    for name, weight in expected.policy.state_dict().items():
        assert torch.equal(resumed[name], weight), name


def test_what_the_cached_reference_depends_on(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, tmp_path: Path
) -> None:
    def key(seed: int = 0, **adapter: Any) -> str:
        config = make_config(adapter={"name": "lora", **adapter}, training__seed=seed)
        return weights_sha256(policy_of(config, tokenizer, CPU))

    def loaded(name: str, **options: Any) -> str:
        return save_adapter(tmp_path / name, tiny_llama, **options)

    fresh = key(target_modules=["q_proj", "down_proj"])
    assert key(target_modules=["q_proj", "down_proj"], r=2, alpha=1, seed=3) == fresh
    first = key(path=loaded("first"))
    assert key(path=loaded("twin")) == first
    others = {
        "weights": key(path=loaded("weights", seed=2)),
        "scale": key(path=loaded("scale", lora_alpha=6)),
        "fresh": fresh,
        "dora": key(target_modules=["q_proj", "down_proj"], dora=True),
        "loaded dora": key(path=loaded("dora", use_dora=True)),
    }
    assert len({first, *others.values()}) == 6
    assert key(path=loaded("dropout", lora_dropout=0.3), seed=3) == first


def test_a_frozen_copy_does_not_count_twice(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, sft: str
) -> None:
    keys = [
        weights_sha256(
            policy_of(
                make_config(adapter={"name": "lora", "path": sft}, reference=mode), tokenizer, CPU
            )
        )
        for mode in ("cached", "adapter")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("option", [{"r": 16}, {"alpha": 3}, {"target_modules": "all-linear"}])
def test_a_loaded_adapter_describes_itself(make_config: MakeConfig, option: Any) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"adapter\.{name}: the adapter at path brings its own"):
        make_config(adapter={"name": "lora", "path": "sft", **option})


def test_the_saved_config_of_a_loaded_adapter_reads_back(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    from fastpref.config import load

    config = make_config(adapter={"name": "lora", "path": "sft", "merge": False})
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "saved.yaml").to_yaml() == config.to_yaml()


@pytest.mark.parametrize(
    ("options", "edits", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "base model (modules_to_save: ['lm_head']); merge"),
        ({"bias": "all"}, {}, "also changes weights of the base model (bias: all)"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "(init_lora_weights: pissa_niter_4)"),
        ({"target_modules": ["lm_head"]}, {}, "adapter.path: the head of LlamaForCausalLM must be"),
        ({}, {"target_modules": ["no_such"]}, "adapter.path: cannot load"),
        ({}, {"r": 4}, "does not fit the model: size mismatch for"),
        ({}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}, "does not fit the model (dif"),
        ({}, {"target_modules": ["q_proj"]}, "does not fit the model (differs in base_model"),
    ],
)
def test_an_adapter_that_cannot_be_trained_on_is_refused(
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    tiny_llama: str,
    tmp_path: Path,
    options: dict[str, Any],
    edits: dict[str, Any],
    message: str,
) -> None:
    path = Path(save_adapter(tmp_path / "sft", tiny_llama, **options))
    description = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**description, **edits}))
    assert message in refusal(make_config(adapter={"name": "lora", "path": str(path)}), tokenizer)


def test_what_is_no_lora_adapter_is_refused(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, tmp_path: Path
) -> None:
    config = make_config(adapter={"name": "lora", "path": str(tmp_path / "ia3")})
    assert "adapter.path: cannot load" in refusal(config, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    other = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    other.save_pretrained(tmp_path / "ia3")
    assert "is of type IA3, and only LORA can be trained" in refusal(config, tokenizer)


def refusal(config: Config, tokenizer: PreTrainedTokenizerFast) -> str:
    """Message of the ModelError, which is one line."""
    with pytest.raises(ModelError) as caught:
        policy_of(config, tokenizer, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_on_tied_embeddings_are_refused(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    values = {**LLAMA, "tie_word_embeddings": True}
    config = make_config(
        model={"init": "random", "config": values, "dtype": "float32"},
        adapter={"name": "lora", "target_modules": ["embed_tokens"]},
    )
    with pytest.raises(
        ModelError, match=r"adapter\.target_modules: the embeddings of Llama.* also its head"
    ):
        policy_of(config, tokenizer, CPU)
