"""Runs of rounds with a tiny Llama and a rule-based scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpref import config as configs
from fastpref.rounds import loop
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


class Letters:
    """Scorer: the number of different letters."""

    fingerprint = "letters"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(len(set(text))) for text in completions]


def config_of(llama: str, home: Path, name: str = "run", **sections: Any) -> configs.Config:
    """Two rounds of two steps on pairs of six prompts; sections are merged into it."""
    path = home / "prompts.jsonl"
    if not path.exists():
        write_jsonl(path, [{"prompt": row["prompt"]} for row in rows(9)])
    values: dict[str, Any] = {
        "model": {"path": llama, "dtype": "float32"},
        "data": {"train": str(path), "max_length": 64, "cache": str(home / "cache")},
        "loss": {"name": "dpo"},
        "optim": {"lr": 1e-2},
        "training": {
            "batch_size": 3,
            "activation_checkpointing": "off",
            "log_every": 1,
            "checkpoint_every": 1,
            "device": "cpu",
            "output_dir": str(home / name),
        },
        "rounds": {
            "count": 2,
            "prompts": 6,
            "sampling": {"samples": 3, "max_new_tokens": 5, "batch_size": 6},
            "scorer": {"function": "not:used"},
        },
    }
    for section, value in sections.items():
        old = values.get(section)
        values[section] = {**old, **value} if isinstance(old, dict) else value
    return configs.parse(values)


def play(config: configs.Config) -> Path:
    return loop.run(config, Display(Console(quiet=True)), scorer=Letters)
