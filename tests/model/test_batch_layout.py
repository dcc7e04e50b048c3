"""Layouts of a run: choice, errors, and equality of the trained models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpref.config import Config, ConfigError
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers.data import rows, scored, write_jsonl
from tests.helpers.training_runs import records, run, weights

MakeConfig = Callable[..., Config]
FALCON = {
    "model_type": "falcon", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4,
}  # fmt: skip


def notes(config: Config) -> tuple[Trainer, str]:
    console = Console(record=True, width=200)
    with Display(console) as display:
        return Trainer(config, display), console.export_text()


def test_prompts_are_shared_where_nothing_else_is_asked_for(make_config: MakeConfig) -> None:
    trainer, said = notes(make_config())
    assert trainer.policy.layout == "prefix_shared"
    assert "saved by leaving out padding" in said and "by sharing prompts" in said
    (batch,) = trainer.policy.batches(trainer.run.train.groups, [3])
    assert batch.input_ids.shape[0] == 1 and batch.segments is not None


@pytest.mark.parametrize(
    "change", [{"training__layout": "padded"}, {"model__attn_implementation": "eager"}]
)
def test_rows_are_padded_where_that_is_asked_for(make_config: MakeConfig, change: Any) -> None:
    trainer, said = notes(make_config(**change))
    assert trainer.policy.layout == "padded" and "tokens:" not in said


def test_a_model_that_cannot_share_is_padded_and_the_user_told(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    model = {"init": "random", "config": FALCON, "dtype": "float32"}
    trainer, said = notes(make_config(model=model))
    assert trainer.policy.layout == "padded"
    assert "note: FalconForCausalLM cannot share prompts; each response has its own row" in said
    with pytest.raises(ConfigError, match="FalconForCausalLM computes different hidden"):
        notes(
            make_config(
                model=model,
                training__layout="prefix_shared",
                training__output_dir=str(tmp_path / "other"),
            )
        )


QWEN = {
    "model_type": "qwen2_moe", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "use_sliding_window": True, "sliding_window": 24, "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize("longer", ["data__train", "data__eval"])
def test_one_long_sequence_of_either_file_forbids_a_window_of_the_mask_alone(
    make_config: MakeConfig, tmp_path: Path, longer: str
) -> None:
    short = [{"prompt": "a", "chosen": " tea" * (1 + k % 2), "rejected": " no"} for k in range(6)]
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", short))
        for name in ("data__train", "data__eval")
    }
    model = {"init": "random", "config": QWEN, "dtype": "float32"}
    trainer, _ = notes(make_config(model=model, **files))
    assert trainer.policy.layout == "prefix_shared"
    long = [*short, {"prompt": "a", "chosen": " tea" * 40, "rejected": " no"}]
    files[longer] = str(write_jsonl(tmp_path / "long.jsonl", long))
    out = str(tmp_path / "other")
    trainer, said = notes(make_config(model=model, training__output_dir=out, **files))
    assert trainer.policy.layout == "padded"
    assert "cannot share prompts; each response has its own row: its layers keep a window" in said


def test_a_model_whose_padding_changes_its_results_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "padding_error", lambda policy, groups: 0.5)
    with pytest.raises(ModelError) as caught:
        notes(make_config(model__attn_implementation="eager"))
    assert str(caught.value) == (
        "model: LlamaForCausalLM computes other hidden states in padded rows than for each "
        "sequence alone (they differ by 0.5); use another model"
    )


def test_the_layout_is_compared_again_before_the_export(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=400)
    with Display(console) as display:
        trainer = Trainer(make_config(training__steps=1), display)
        trainer.loop([])
        assert "warning" not in console.export_text(clear=False)
        trainer.export()
        assert "warning" not in console.export_text(clear=False)
        monkeypatch.setattr(Policy, "packing_error", lambda policy, groups: 0.25)
        trainer.export()
    assert (
        "warning: after training, hidden states in the layout prefix_shared differ by 0.25 from "
        "those of single sequences, which the exported model computes; do not use it, and train "
        "again with training.layout=padded"
    ) in console.export_text()


def test_flat_rows_are_for_flash_attention(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"packed needs model.attn_implementation: flash_"):
        notes(make_config(training__layout="packed"))


def test_on_cpu_a_pass_holds_one_group_so_that_its_bits_are_its_own(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Without batch invariance one pass holds all groups; log-probs agree up to rounding."""
    chosen = {}
    for invariant in (True, False):
        out = str(tmp_path / str(invariant))
        config = make_config(training__batch_invariant=invariant, training__output_dir=out)
        trainer, _ = notes(config)
        split = trainer.run.train
        batches = trainer.policy.batches(split.groups, [0, 1, 2])
        assert len(batches) == (3 if invariant else 1)
        chosen[invariant] = trainer.forward(batches, split.reference).policy.chosen
    (alone,) = trainer.policy.batches(split.groups, [1])
    assert torch.equal(trainer.policy(alone).logps[0], chosen[True][1])
    torch.testing.assert_close(chosen[False], chosen[True], rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "ti_dpo", "nca"])
def test_shared_prompts_train_the_same_model(
    make_config: MakeConfig, display: Display, tmp_path: Path, loss: str
) -> None:
    """Metrics of five steps and the parameters after them, in fp32, with checkpointing."""
    data = write_jsonl(tmp_path / "d.jsonl", scored(24) if loss == "nca" else rows(24))
    trained, lines = {}, {}
    for layout in ("prefix_shared", "padded"):
        config = make_config(
            loss={"name": loss, "beta": 0.1}, data__train=str(data), optim__eps=1e-4,
            training__steps=5, training__layout=layout, training__output_dir=str(tmp_path / layout),
            training__activation_checkpointing="full",
        )  # fmt: skip
        trained[layout] = weights(run(config, display))
        lines[layout] = records(config)
    for a, b in zip(lines["prefix_shared"], lines["padded"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for name, value in trained["padded"].items():
        torch.testing.assert_close(trained["prefix_shared"][name], value, rtol=0, atol=1e-5)
