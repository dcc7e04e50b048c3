"""Read the config and the metrics of run directories for a report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpref import config as configs
from fastpref import metrics
from fastpref.utils.errors import UserError

_DEPTH = 3  # levels of folders in which runs are looked for
Values = np.ndarray[Any, np.dtype[np.float64]]


class Series(NamedTuple):
    """Metric over optimizer steps, each (N,); `low` and `high` bound the averaged values."""

    steps: Values
    values: Values
    low: Values
    high: Values

    def thinned(self, points: int = 1000) -> Series:
        """Downsample to at most `points` means of adjacent values, with minimum and maximum."""
        count = len(self.steps)
        if count <= points:
            return self
        starts = np.linspace(0, count, points, endpoint=False).astype(int)
        sizes = np.diff(starts, append=count)
        steps, values = (np.add.reduceat(x, starts) / sizes for x in self[:2])
        low, high = np.minimum.reduceat(self.low, starts), np.maximum.reduceat(self.high, starts)
        return Series(steps, values, low, high)

    @property
    def ends(self) -> tuple[float, float]:
        """Means of the first and the last tenth of the values; single batches are noisy."""
        size = max(1, len(self.values) // 10)
        return float(self.values[:size].mean()), float(self.values[-size:].mean())


@dataclass(frozen=True)
class Run:
    """A run with a name that is unique in the report."""

    name: str
    config: configs.Config
    records: list[dict[str, Any]]  # of training and evaluation, in order
    samples: Sequence[dict[str, Any]] = ()  # lines of `samples.jsonl`
    rounds: Sequence[dict[str, Any]] = ()  # lines of `rounds.jsonl`

    @property
    def step(self) -> int:
        """Last logged optimizer step."""
        return int(self.records[-1]["step"])

    def series(self, metric: str) -> Series:
        """Finite values of a metric, possibly none."""
        return self.aligned(metric)[0]

    def aligned(self, *metrics: str) -> list[Series]:
        """Values of several metrics from the records in which all of them are finite."""
        records = [
            record for record in self.records if all(_finite(record.get(name)) for name in metrics)
        ]
        steps, *columns = (
            np.array([record[name] for record in records], dtype=np.float64)
            for name in ("step", *metrics)
        )
        return [Series(steps, values, values, values) for values in columns]

    def last(self, metric: str) -> Any:
        """Last value of a metric, of any type; None if there is none."""
        return next((record[metric] for record in reversed(self.records) if metric in record), None)

    def histograms(self, metric: str) -> list[tuple[int, dict[str, Any]]]:
        """Steps and values of a metric whose values are histograms."""
        return [(record["step"], record[metric]) for record in self.records if metric in record]

    @cached_property
    def settings(self) -> dict[str, str]:
        """All fields of the config as text, keyed by `section.field`."""
        settings = {}
        for section, values in self.config.model_dump(mode="json").items():
            fields = values if isinstance(values, dict) else {"": values}
            for name, value in fields.items():
                settings[f"{section}.{name}".rstrip(".")] = "–" if value is None else str(value)
        return settings


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder of runs by the runs that have metrics, in natural order of their names.

    Where no run has metrics yet they are all kept, and a path that is neither a run nor a folder of
    runs is kept too, for `load` to refuse.
    """
    return [folder for path in paths for folder in _runs_in(path) or [path]]


def _runs_in(path: Path) -> list[Path]:
    if _is_run(path) or not path.is_dir():
        return []
    runs = sorted(_below(path, _DEPTH), key=lambda run: _natural(str(run.relative_to(path))))
    return [run for run in runs if has_metrics(run)] or runs


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Runs in a folder and in the folders that it holds, such as grids; not those inside a run."""
    for inner in folder.iterdir():
        if _is_run(inner):
            yield inner
        elif depth > 1 and inner.is_dir() and not inner.is_symlink():
            yield from _below(inner, depth - 1)


def has_metrics(folder: Path) -> bool:
    """Whether a folder is a run that has logged a line of metrics."""
    if not _is_run(folder):
        return False
    with (folder / "metrics.jsonl").open("rb") as file:
        return file.readline().endswith(b"\n")


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _natural(name: str) -> list[tuple[float, str]]:
    """Sort key that compares the numbers in names by size: `lr=5e-7` is before `lr=1e-6`."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(float(part), "") if k % 2 else (math.inf, part) for k, part in enumerate(parts)]


def load(folders: Sequence[Path]) -> list[Run]:
    """Read runs in order. Raises UserError that names the invalid folder or file."""
    for folder, count in Counter(path.resolve() for path in folders).items():
        if count > 1:
            raise UserError(f"{folder}: is given twice; name each run once")
    return [_load(folder, name) for folder, name in zip(folders, names(folders), strict=True)]


def names(folders: Sequence[Path]) -> list[str]:
    """Shortest path suffixes of equal depth that are unique."""
    paths = [path.resolve().parts for path in folders]
    deepest = max(map(len, paths))
    candidates = (["/".join(parts[-k:]) for parts in paths] for k in range(1, deepest + 1))
    return next(suffixes for suffixes in candidates if len({*suffixes}) == len(suffixes))


def _load(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    if not _is_run(folder):
        raise UserError(
            f"{folder}: not a run directory; expected one with config.yaml and metrics.jsonl, as "
            "`fastpref train` writes it, or a folder of such"
        )
    try:
        config = configs.load(folder / "config.yaml")
    except configs.ConfigError as error:
        raise UserError(f"{folder}: the config of the run cannot be read: {error}") from None
    try:
        records = metrics.read_records(path)
    except (ValueError, RecursionError):
        records = [{}]
    if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in records):
        raise UserError(
            f"{path}: expected a JSON object with a step on every line; is it damaged? "
            "restore it, or leave this run out"
        )
    if not records:
        raise UserError(f"{path}: holds no metrics yet; wait for the first step of the run")
    samples = _lines(folder / "samples.jsonl", ("step", "prompt", "completion", "finished"))
    rounds = _lines(folder / "rounds.jsonl", ("round", "step"))
    return Run(name, config, records, samples, rounds)


def _lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of a file that have the keys; none if there is no such file, or one that is damaged."""
    try:
        lines = metrics.read_records(path)
    except (ValueError, RecursionError):
        return []
    return [line for line in lines if isinstance(line, dict) and all(key in line for key in keys)]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
