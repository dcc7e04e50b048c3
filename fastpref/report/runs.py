"""What a run directory holds, read for a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpref import config as configs
from fastpref import metrics
from fastpref.utils.errors import UserError

Values = np.ndarray[Any, np.dtype[np.float64]]


class Series(NamedTuple):
    """A metric against the optimizer step, each (N,); `low` and `high` bound what a mean is of."""

    steps: Values
    values: Values
    low: Values
    high: Values

    def thinned(self, points: int = 1000) -> Series:
        """At most `points` of them: means of neighbours, and the least and the largest."""
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
        """Means of the first and of the last tenth: of batches, one alone would be chance."""
        size = max(1, len(self.values) // 10)
        return float(self.values[:size].mean()), float(self.values[-size:].mean())


@dataclass(frozen=True)
class Run:
    """A run under a name that no other of the report has."""

    name: str
    config: configs.Config
    records: list[dict[str, Any]]  # of training and evaluation, in order

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"])

    def series(self, metric: str) -> Series:
        """The finite values of a metric; empty where there are none."""
        return self.together(metric)[0]

    def together(self, *metrics: str) -> list[Series]:
        """The values of several metrics in the lines in which all of them are finite."""
        lines = [each for each in self.records if all(_finite(each.get(name)) for name in metrics)]
        steps, *columns = (
            np.array([line[name] for line in lines], dtype=np.float64)
            for name in ("step", *metrics)
        )
        return [Series(steps, values, values, values) for values in columns]

    def last(self, metric: str) -> Any:
        """The newest value of a metric, also one that is no number; None where there is none."""
        return next((line[metric] for line in reversed(self.records) if metric in line), None)

    def histograms(self, metric: str) -> list[tuple[int, dict[str, Any]]]:
        return [(line["step"], line[metric]) for line in self.records if metric in line]

    @cached_property
    def settings(self) -> dict[str, str]:
        """Every field of the config as text, by its path; sections two levels deep."""
        settings = {}
        for section, values in self.config.model_dump(mode="json").items():
            fields = values if isinstance(values, dict) else {"": values}
            for name, value in fields.items():
                settings[f"{section}.{name}".rstrip(".")] = "–" if value is None else str(value)
        return settings


def load(folders: Sequence[Path]) -> list[Run]:
    """Runs in the order given. Raises UserError naming the folder or file at fault."""
    for folder, count in Counter(path.resolve() for path in folders).items():
        if count > 1:
            raise UserError(f"{folder}: is given twice; name each run once")
    return [_load(folder, name) for folder, name in zip(folders, names(folders), strict=True)]


def names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell all of them apart."""
    paths = [path.resolve().parts for path in folders]
    deepest = max(map(len, paths))
    candidates = (["/".join(parts[-k:]) for parts in paths] for k in range(1, deepest + 1))
    return next(found for found in candidates if len({*found}) == len(found))


def _load(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    if not (folder / "config.yaml").is_file() or not path.is_file():
        raise UserError(
            f"{folder}: not a run directory; expected one with config.yaml and metrics.jsonl, as "
            "`fastpref train` writes it"
        )
    try:
        config = configs.load(folder / "config.yaml")
    except configs.ConfigError as error:
        raise UserError(f"{folder}: the config of the run cannot be read: {error}") from None
    try:
        records = metrics.read(path)
    except (ValueError, RecursionError):
        records = [{}]
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in records):
        raise UserError(
            f"{path}: expected a JSON object with a step on every line; is it damaged? "
            "restore it, or leave this run out"
        )
    if not records:
        raise UserError(f"{path}: holds no metrics yet; wait for the first step of the run")
    return Run(name, config, records)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
