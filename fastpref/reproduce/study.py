"""What a reproduction is: runs, a table of what became of them, and claims with a number each.

A claim is a number of one seed's runs and a bound for it, so a verdict is arithmetic: reproduced
where the number keeps to its side of the bound in every seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from matplotlib.figure import Figure

BASELINES: dict[str, dict[str, Any]] = {  # with which more than one paper compares
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "cpo": {"name": "cpo", "beta": 0.1, "lam": 1.0},
}
Record = dict[str, Any]  # a line of metrics: `step` and what was measured there


@dataclass(frozen=True)
class Job:
    """A run: a training from the model of its seed, or what `alone` does instead.

    measure: what is measured of the trained Trainer beside its metrics. Both are functions of a
    module, for they travel to another process. judged: on generated data, its samples are graded.
    """

    label: str  # e.g. "dpo, RC"
    seed: int
    config: dict[str, Any]  # sections in which it differs from the study's other jobs
    data: str = "pairs"  # the files that it reads, of `data.KINDS`
    measure: Callable[[Any, Job], Record] | None = None
    alone: Callable[[Job], list[Record]] | None = None
    judged: bool = False


class Missing(LookupError):
    """A run has not measured something: its data does not allow it."""


@dataclass(frozen=True)
class Outcome:
    """What a run has measured: the lines of its metrics file, with the metrics a study keeps."""

    label: str
    seed: int
    records: list[Record]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values."""
        found = [(line["step"], line[metric]) for line in self.records if metric in line]
        return [step for step, _ in found], [value for _, value in found]

    def has(self, metric: str) -> bool:
        return any(metric in line for line in self.records)

    def first(self, metric: str) -> float:
        return self._values(metric)[0]

    def last(self, metric: str) -> float:
        return self._values(metric)[-1]

    def mean(self, metric: str) -> float:
        """Over the lines of the file: all logged steps count alike."""
        return statistics.fmean(self._values(metric))

    def _values(self, metric: str) -> list[float]:
        values = self.series(metric)[1]
        if not values:
            raise Missing(f"{self.label}: {metric}")
        return values

    def share(self, holds: Callable[[Record], bool], metric: str) -> float:
        """Of the lines that have the metric, those in which something holds."""
        lines = [line for line in self.records if metric in line]
        return sum(map(holds, lines)) / len(lines)


Runs = dict[str, Outcome]  # of one seed, by label


@dataclass(frozen=True)
class Claim:
    """What a paper says, and a number of a seed's runs: it holds above, or below, a bound."""

    statement: str
    source: str  # where the paper says so
    number: str  # what it is, with its unit
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
    """Of the last values of a metric in two runs: what a claim says is positive."""
    return lambda runs: runs[more].last(metric) - runs[less].last(metric)


@dataclass(frozen=True)
class Column:
    """A number of each run in the study's table."""

    title: str  # with the unit
    value: Callable[[Outcome], float]
    metric: str  # without which a run has none
    digits: int = 2


def final(title: str, metric: str, digits: int = 2) -> Column:
    """The last value of a metric."""
    return Column(title, lambda run: run.last(metric), metric, digits)


def mean(title: str, metric: str, digits: int = 2) -> Column:
    """The mean of a metric over the logged steps."""
    return Column(title, lambda run: run.mean(metric), metric, digits)


@dataclass(frozen=True)
class Study:
    """The experiments of a paper at a size that anyone can run."""

    name: str
    title: str
    paper: str
    setting: str  # what is trained on what, and what differs from the paper
    jobs: Callable[[int, bool], list[Job]]  # of a seed; few or short ones if quick
    training: dict[str, Any]  # sections of the config that all jobs share
    keep: tuple[str, ...]  # metrics that go into the result file
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    draw: Callable[[Sequence[Runs]], Figure]
    caption: str  # of the picture
    speaks: str = "pairs"  # the data that the model learns to speak from
    speech: str | dict[str, Any] = "sft"  # by which objective
    by_epoch: bool = False  # log and evaluate once an epoch
    takes_groups: bool = True  # a user's, instead of generated ones


def load(name: str) -> Study:
    """The study of `fastpref.reproduce.NAME`."""
    found: Study = import_module(f"fastpref.reproduce.papers.{name}").STUDY
    return found


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """In words: whether it holds in every seed, in some, or in none."""
    held = sum(map(claim.holds, values))
    if not values:
        return "not measured"
    if held == len(values):
        return "reproduced"
    return f"in {held} of {len(values)} seeds" if held else "not reproduced"


def spread(values: Sequence[float], form: str) -> str:
    """`mean (least to most)` in a format such as `.2f`, or the value where there is one."""
    mean, low, high = (
        f"{value:{form}}".replace("-", "−")
        for value in (statistics.fmean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
