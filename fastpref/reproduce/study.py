"""Definition of a reproduction: runs, a table of their metrics, and claims with a number each.

A claim is a number of one seed's runs and a bound for it, so a verdict is arithmetic: the claim is
reproduced if the number is on the claimed side of the bound in every seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from matplotlib.figure import Figure

# Objectives with which more than one paper compares.
BASELINES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "cpo": {"name": "cpo", "beta": 0.1, "lam": 1.0},
}
Record = dict[str, Any]  # a line of metrics, `step` among them


@dataclass(frozen=True)
class Job:
    """A run: training from the model of its seed, or a call of `function` instead.

    measure: computes further metrics from the Trainer after training. Both must be functions of a
    module, since they are pickled. scores_samples: on generated data, score the model's samples.
    """

    label: str  # e.g. "dpo, RC"
    seed: int
    config: dict[str, Any]  # sections that differ from the study's other jobs
    data: str = "pairs"  # a key of `data.KINDS`
    measure: Callable[[Any, Job], Record] | None = None
    function: Callable[[Job], list[Record]] | None = None
    scores_samples: bool = False


class Missing(LookupError):
    """A run lacks a metric, because its data does not allow it."""


@dataclass(frozen=True)
class Outcome:
    """Metrics of a run: the lines of its metrics file, reduced to the metrics of the study."""

    label: str
    seed: int
    records: list[Record]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric."""
        lines = [line for line in self.records if metric in line]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def has(self, metric: str) -> bool:
        return any(metric in line for line in self.records)

    def first(self, metric: str) -> float:
        return self._values(metric)[0]

    def last(self, metric: str) -> float:
        return self._values(metric)[-1]

    def mean(self, metric: str) -> float:
        """Mean over the logged steps."""
        return statistics.fmean(self._values(metric))

    def _values(self, metric: str) -> list[float]:
        values = self.series(metric)[1]
        if not values:
            raise Missing(f"{self.label}: {metric}")
        return values

    def share(self, holds: Callable[[Record], bool], metric: str) -> float:
        """Share of the lines with a metric in which `holds` is true."""
        lines = [line for line in self.records if metric in line]
        return sum(map(holds, lines)) / len(lines)


Runs = dict[str, Outcome]  # runs of one seed, by label


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and a number of a seed's runs that must be above or below a bound."""

    statement: str
    source: str  # section, table or figure of the paper
    number: str  # description of `value`, with its unit
    value: Callable[[Runs], float]
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (self.above is None or value > self.above) and (
            self.below is None or value < self.below
        )

    @property
    def bound(self) -> str:
        sides = (("above", self.above), ("below", self.below))
        return " and ".join(f"{word} {side:g}" for word, side in sides if side is not None)


def difference(metric: str, more: str, less: str) -> Callable[[Runs], float]:
    """A claim's value: the last value of a metric in the run `more`, less that in `less`."""
    return lambda runs: runs[more].last(metric) - runs[less].last(metric)


@dataclass(frozen=True)
class Column:
    """A number of each run in the study's table."""

    title: str  # with the unit
    value: Callable[[Outcome], float]
    metric: str  # runs without this metric have no value
    digits: int = 2


def final(title: str, metric: str, digits: int = 2) -> Column:
    """Column of the last value of a metric."""
    return Column(title, lambda run: run.last(metric), metric, digits)


def mean(title: str, metric: str, digits: int = 2) -> Column:
    """Column of the mean of a metric over the logged steps."""
    return Column(title, lambda run: run.mean(metric), metric, digits)


@dataclass(frozen=True)
class Study:
    """Experiments of a paper, at a size that anyone can run."""

    name: str
    title: str
    paper: str
    setting: str  # model, data and training, and the differences from the paper
    jobs: Callable[[int, bool], list[Job]]  # (seed, quick); few or short jobs if quick
    training: dict[str, Any]  # sections of the config that all jobs share
    metrics: tuple[str, ...]  # in the result file
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    draw: Callable[[Sequence[Runs]], Figure]
    caption: str  # of the picture
    sft_data: str = "pairs"  # data of the SFT warm-up
    sft_loss: str | dict[str, Any] = "sft"  # objective of the SFT warm-up
    by_epoch: bool = False  # log and evaluate once an epoch
    takes_groups: bool = True  # accepts a user's groups instead of generated ones


def load(name: str) -> Study:
    """The study of `fastpref.reproduce.papers.NAME`."""
    study: Study = import_module(f"fastpref.reproduce.papers.{name}").STUDY
    return study


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """The verdict in words: the claim holds in every seed, in some, or in none."""
    count = sum(map(claim.holds, values))
    if not values:
        return "not measured"
    if count == len(values):
        return "reproduced"
    return f"in {count} of {len(values)} seeds" if count else "not reproduced"


def spread(values: Sequence[float], form: str) -> str:
    """`mean (minimum to maximum)` in a format such as `.2f`; a single value is shown alone."""
    mean, low, high = (
        f"{value:{form}}".replace("-", "−")
        for value in (statistics.fmean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
