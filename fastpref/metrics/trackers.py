"""Trackers that log metrics: `metrics.jsonl`, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fastpref import distributed
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError, first_line


class Tracker(Protocol):
    """Destination of metrics records."""

    def log(self, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """The file `metrics.jsonl`: one JSON object per line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        # Records after the checkpoint will be written again.
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in iter_records(path) if resume_step else ():
                if record["step"] <= resume_step:
                    file.write(json.dumps(record) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files in `tensorboard/` of the run directory."""

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
    """A Weights & Biases run."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        try:
            self._run: Any = wandb.init(
                project="fastpref", name=folder.name, dir=folder, config=config, resume="allow"
            )
        except Exception as error:  # wandb raises many types: login, network, quota
            raise UserError(f"training.report_to: wandb failed: {first_line(error)}") from None

    def log(self, metrics: dict[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self._run.log(numbers, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def open_trackers(
    folder: Path, names: Iterable[str], config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """Open the metrics file and the trackers of `names`; drop records after `resume_step`.

    Only rank 0 logs metrics; the list is empty on other ranks.
    """
    if not distributed.is_main_process():
        return []
    trackers: list[Tracker] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    for name in names:
        trackers.append(
            TensorBoard(folder, resume_step) if name == "tensorboard" else WandB(folder, config)
        )
    return trackers


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file, which may have one line per step of a long run.

    An incomplete last line, left by a crash, is skipped.
    """
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics file."""
    return list(iter_records(path))


def _missing(name: str) -> UserError:
    return UserError(f"training.report_to: {name} is not installed; pip install 'fastpref[track]'")
