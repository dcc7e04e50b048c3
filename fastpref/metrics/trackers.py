"""Where metrics go: `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fastpref import distributed
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError, first_line


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as kept:
            for line in lines(path) if resume_step else ():
                if line["step"] <= resume_step:
                    kept.write(json.dumps(line) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step" and not isinstance(value, dict):
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        try:
            self._run: Any = wandb.init(
                project="fastpref", name=folder.name, dir=folder, config=config, resume="allow"
            )
        except Exception as error:  # no login, no network, no quota: its own types
            raise UserError(f"training.report_to: wandb failed: {first_line(error)}") from None

    def log(self, metrics: dict[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self._run.log(numbers, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def trackers(
    folder: Path, names: Iterable[str], config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The metrics file and whatever else was asked for; lines after `resume_step` are dropped.

    The first rank writes for all.
    """
    if not distributed.is_main_process():
        return []
    made: list[Tracker] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    for name in names:
        made.append(
            TensorBoard(folder, resume_step) if name == "tensorboard" else WandB(folder, config)
        )
    return made


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one at a time: there may be as many as a long run has steps.

    A last line that a crash cut short is left out.
    """
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read(path: Path) -> list[dict[str, Any]]:
    """All `lines` of a metrics file."""
    return list(lines(path))


def _missing(name: str) -> UserError:
    return UserError(f"training.report_to: {name} is not installed; pip install 'fastpref[track]'")
