"""Contents of a run directory, read without torch: whether it has a run, and of which data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastpref.config import Config, ConfigError

_STATE = "state.json"
_ORDER = ("training.batch_size", "training.seed")
_OF_TOKENS = ("data.", "model.path", "model.tokenizer", "loss.name")
_NOT_OF_TOKENS = ("data.cache", "data.eval")


def holds_run(folder: Path) -> bool:
    """Whether a run in the folder has taken a step, by its checkpoints or metrics."""
    return bool(_checkpoints(folder)) or _has_step(folder / "metrics.jsonl")


def newest_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint of a run directory, undamaged or not; None if there is none."""
    steps = _checkpoints(folder)
    return folder / "checkpoints" / f"step-{max(steps)}" if steps else None


def check_order(
    checkpoint: Path, config: Config, key: list[Any] | None = None, saved: list[Any] | None = None
) -> None:
    """Raise ConfigError, with both values, where a run would go on with another order of the data.

    key, saved: of this run and of the checkpoint, `[fingerprint, labels, batch size, seed]`; by
        default the checkpoint is read, and the data, which need tokens, are not compared.
    """
    if saved is None:
        saved = _saved_key(checkpoint)
    new = [config.training.batch_size, config.training.seed]
    differences = [
        f"{field}: {before} → {now}"
        for field, before, now in zip(_ORDER, saved[2:4], new, strict=False)
        if before != now
    ]
    if key is not None and [*saved[:2], *saved[4:]] != [*key[:2], *key[4:]]:
        differences += _data_differences(checkpoint, config) or [
            f"data.train: rows or tokens of {config.data.train}, {_short(saved)} → {_short(key)}"
        ]
    if differences:
        raise ConfigError(
            f"resume: {checkpoint} is of a run with other data or another order of it: "
            f"{', '.join(differences)}; restore what differs, or choose another "
            "training.output_dir"
        )


def check_steps(checkpoint: Path, taken: int, steps: int) -> None:
    """Raise ConfigError where a run would have fewer steps than its checkpoint has taken."""
    if taken > steps:
        raise ConfigError(
            f"resume: {checkpoint} has taken {taken:,} steps, and the run has {steps:,} by "
            "training.steps or training.epochs; raise it, or resume an earlier checkpoint"
        )


def _saved_key(checkpoint: Path) -> list[Any]:
    """Key of the data and their order in a checkpoint; empty if it cannot be read."""
    try:
        return list(json.loads((checkpoint / _STATE).read_bytes())["position"]["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _data_differences(checkpoint: Path, config: Config) -> list[str]:
    """Fields that decide tokens and differ from the config in the directory of the checkpoint."""
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        return []
    return [
        difference
        for difference in config.differences(path)
        if difference.startswith(_OF_TOKENS) and not difference.startswith(_NOT_OF_TOKENS)
    ]


def _short(key: list[Any]) -> str:
    """First characters of a fingerprint."""
    return str(key[0])[:8] if key else "unknown"


def _checkpoints(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("checkpoints/*"))
    return [int(name[1]) for name in names if name]


def _has_step(metrics: Path) -> bool:
    """Whether a metrics file has a record of a step, or one that cannot be read."""
    if not metrics.is_file():
        return False
    with metrics.open("rb") as file:
        for line in file:
            try:
                # Step 0 is the evaluation before the first step.
                if not line.endswith(b"\n") or json.loads(line)["step"] > 0:
                    return True
            except (ValueError, KeyError, TypeError):
                return True
    return False
