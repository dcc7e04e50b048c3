"""Trainers of a small Llama on the pairs of a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpref import config as configs
from fastpref.model.policy import ScoreOptions
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

LLAMA = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
PROMPT = 200  # characters at most, so that 128 tokens have room for a response
HELD_OUT = 96
BATCH = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1},
    "cpo": {"name": "cpo", "beta": 0.1, "lam": 1.0},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
}


def split(rows: list[dict[str, Any]], folder: Path, seeds: int, train_pairs: int) -> None:
    """Write train.jsonl and held_out.jsonl of each seed."""
    fit = [row for row in rows if len(row["prompt"]) <= PROMPT]
    if len(fit) < train_pairs + HELD_OUT:
        raise SystemExit(
            f"--data: {len(fit)} rows have prompts of {PROMPT} characters or less, but --steps "
            f"needs {train_pairs + HELD_OUT}; lower it"
        )
    for seed in range(seeds):
        drawn = random.Random(seed).sample(fit, train_pairs + HELD_OUT)
        (folder / str(seed)).mkdir()
        for name, part in (("train", drawn[:train_pairs]), ("held_out", drawn[train_pairs:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / str(seed) / f"{name}.jsonl").write_text(lines)


def make_trainer(
    folder: Path, seed: int, name: str, training: dict[str, Any], **sections: Any
) -> Trainer:
    """Build a trainer on the split of a seed; its run directory is `folder / seed / name`."""
    home = folder / str(seed)
    values = {
        "data": {
            "train": str(home / "train.jsonl"),
            "eval": str(home / "held_out.jsonl"),
            "max_length": LLAMA["max_position_embeddings"],
            "soft_labels": False,
            "cache": str(folder / "cache"),
        },
        "training": {
            "log_every": 1,
            "seed": seed,
            "device": "cpu",
            "activation_checkpointing": False,
            "checkpoint_every": None,
            "output_dir": str(home / name),
            **training,
        },
        **sections,
    }
    return Trainer(configs.parse(values), Display(Console(quiet=True)))


def forward(trainer: Trainer, data: DataSplit, indices: list[int], geometry: bool = False) -> Any:
    """Run a forward pass over some pairs; returns `fastpref.training.forward.MicroBatchLogps`."""
    batches = trainer.policy.batches(data.groups, indices)
    return trainer.forward(batches, data.reference, scores=ScoreOptions(sums=True, pairs=geometry))
