"""Real preference data, where the environment names a folder of it, through the whole trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpref import metrics
from fastpref.config import parse
from fastpref.data.collate import collate
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.trunk import build_trunk
from fastpref.utils.progress import Display

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", ["alpacaeval_pairs.jsonl", "hh_harmless_pairs.jsonl"])
def test_thirty_steps(name: str, real_data: Path, tmp_path: Path, display: Display) -> None:
    """Zero rewards at first, a falling loss over six epochs of 40 pairs, an export that agrees."""
    data = tmp_path / name
    rows = (real_data / name).read_text().splitlines(keepends=True)[:40]
    data.write_text("".join(rows))
    values: dict[str, Any] = {
        "model": {"init": "random", "dtype": "float32", "config": LLAMA},
        "data": {"train": str(data), "max_length": 192, "cache": str(tmp_path / "cache")},
        "loss": "dpo",
        "optim": {"lr": 3e-4},
        "training": {
            "steps": 30,
            "batch_size": 8,
            "log_every": 1,
            "output_dir": str(tmp_path / "run"),
        },
    }
    trainer = Trainer(parse(values), display)
    trainer.loop([])
    lines = metrics.read_records(tmp_path / "run" / "metrics.jsonl")
    assert [lines[0][f"rewards/{key}"] for key in ("chosen", "rejected", "margins")] == [0, 0, 0]
    epochs = [sum(x["loss"] for x in lines[i : i + 5]) / 5 for i in range(0, 30, 5)]
    assert epochs[-1] < epochs[2] < epochs[0]
    assert lines[-1]["rewards/accuracies"] > 0.8

    dataset = trainer.run.train.groups
    pairs = [dataset[i] for i in range(8)]
    with torch.no_grad():
        ours = [trainer.policy(collate([pair])).logps for pair in pairs]
    exported = AutoModelForCausalLM.from_pretrained(trainer.export())
    reloaded = Policy(exported, torch.float32)
    reloaded.trunk = build_trunk(exported.base_model)  # the same code, for the same bits
    with torch.no_grad():
        again = [reloaded(collate([pair])).logps for pair in pairs]
        for pair, value in zip(pairs, ours, strict=True):
            batch = collate([pair])
            logits = exported(input_ids=batch.input_ids).logits.flatten(0, 1)[
                batch.predictor_positions
            ]
            logps = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
            plain = torch.stack([part.mean() for part in logps.split(batch.lengths.tolist())])
            torch.testing.assert_close(value / batch.lengths, plain, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ({"name": "kto"}, "alpacaeval_binary"),
        ({"name": "kto"}, "hh_harmless_pairs"),
        ({"name": "bco", "beta": 0.1}, "alpacaeval_binary"),
        ({"name": "info_nca", "beta": 0.1}, "alpacaeval_scalar"),
        ({"name": "pro_s", "alpha": 4.0}, "alpacaeval_scalar"),
        ({"name": "tdpo2"}, "alpacaeval_pairs"),
        ({"name": "ti_dpo"}, "hh_harmless_pairs"),
    ],
)
def test_other_kinds(
    loss: dict[str, Any], name: str, real_data: Path, tmp_path: Path, display: Display
) -> None:
    """Zero rewards at first and a falling loss over six epochs of 16 rows, some taken apart."""
    data = tmp_path / f"{name}.jsonl"
    rows = (real_data / f"{name}.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:16]))
    values: dict[str, Any] = {
        "model": {"init": "random", "dtype": "float32", "config": LLAMA},
        "data": {"train": str(data), "max_length": 256, "cache": str(tmp_path / "cache")},
        "loss": loss,
        "optim": {"lr": 1e-3},
        "training": {
            "epochs": 6,
            "batch_size": 8,
            "log_every": 1,
            "output_dir": str(tmp_path / "run"),
        },
    }
    trainer = Trainer(parse(values), display)
    trainer.loop([])
    lines = metrics.read_records(tmp_path / "run" / "metrics.jsonl")
    accuracy = "rewards/accuracies"
    assert all(lines[0][k] == 0 for k in lines[0] if k.startswith("rewards/") and k != accuracy)
    assert lines[0].get(accuracy, 0.5) == 0.5  # equal rewards count half
    epoch = trainer.plan.steps_per_epoch
    first, last = (sum(x["loss"] for x in part) for part in (lines[:epoch], lines[-epoch:]))
    assert last < first
    assert lines[-1]["rewards/margins"] > 0
