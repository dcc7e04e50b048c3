"""Short runs for the tests of faults: six steps of two pairs, a checkpoint every second one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from fastpref import config as configs
from fastpref import metrics
from fastpref.config import Config
from fastpref.training.trainer import Trainer, train
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


def config_of(
    llama: str, home: Path, run: Path, resume: str | None = None, **training: Any
) -> configs.Config:
    """The config of a run; data and their cache are in `home`, to be shared."""
    data = home / "pairs.jsonl"
    if not data.exists():
        write_jsonl(data, rows(12))
    values = {
        "model": {"path": llama, "dtype": "float32"},
        "data": {"train": str(data), "max_length": 64, "cache": str(home / "cache")},
        "loss": "dpo",
        "optim": {"lr": 1e-3, "schedule": "cosine"},
        "training": {
            "steps": 6,
            "batch_size": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "device": "cpu",
            "output_dir": str(run),
            **training,
        },
        "resume": resume,
    }
    return configs.parse(values)


def told(config: configs.Config) -> str:
    """Train, and return what a person was told."""
    text = io.StringIO()
    train(config, Display(Console(file=text, width=200)))
    return text.getvalue()


def assert_same(run: Path, whole: Path) -> None:
    """Two runs have the same metrics, but for time and memory, and the same exported weights."""
    lines = [metrics.read_records(folder / "metrics.jsonl") for folder in (run, whole)]
    for line in [*lines[0], *lines[1]]:
        for name in metrics.TIMING_METRICS:
            line.pop(name, None)
    assert lines[0] == lines[1]
    ours, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def run(config: Config, display: Display) -> Trainer:
    trainer = Trainer(config, display)
    trainer.loop([])
    trainer.export()
    return trainer


def lose_power_after(trainer: Trainer, step: int) -> None:
    """Let the loop of a trainer fail with "power cut" once it has taken this step."""
    train_step = trainer._train_step

    def failing(with_entropy: bool) -> Any:
        if trainer.step == step:
            raise RuntimeError("power cut")
        return train_step(with_entropy)

    trainer._train_step = failing  # type: ignore[method-assign]


def records(config: Config) -> list[dict[str, Any]]:
    """Lines of metrics without what depends on the clock."""
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in metrics.TIMING_METRICS} for line in lines]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
