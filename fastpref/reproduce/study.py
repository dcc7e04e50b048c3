"""Definition of a reproduction: runs, a table of their metrics, and claims with a number each.

All runs of a seed start from one model, which has not seen the responses of the pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from matplotlib.figure import Figure

from fastpref.reproduce.claims import Claim, Missing
from fastpref.reproduce.sizes import Size

START = "start"  # label of the model that all runs of a seed begin with

# Objectives with which more than one paper compares.
BASELINES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "cpo": {"name": "cpo", "beta": 0.1, "lam": 1.0},
}
Record = dict[str, Any]  # a line of metrics, `step` among them; or arrays, without it


@dataclass(frozen=True)
class Job:
    """A run: training from the model of its seed, or a call of `function` instead.

    measure: computes further metrics from the Trainer after training. learn: trains the policy of
    the Trainer in place of its loop, and returns lines of metrics. All three must be functions of a
    module, since they are pickled. A list among the metrics is an array, with a value for each
    example. scores_samples: on generated data, score the model's samples.
    """

    label: str  # e.g. "dpo, RC"
    seed: int
    config: dict[str, Any]  # sections that differ from the study's other jobs
    data: str = "pairs"  # a key of `data.KINDS`
    measure: Callable[[Any, Job], Record] | None = None
    function: Callable[[Job], list[Record]] | None = None
    learn: Callable[[Any, Job], list[Record]] | None = None
    scores_samples: bool = False
    held_out: str | None = None  # kind of the held-out pairs, unless it is the study's


@dataclass(frozen=True)
class Outcome:
    """Metrics of a run: the lines of its metrics file, reduced to the metrics of the study.

    arrays: values by example, such as `pairs/chosen` for every held-out pair.
    """

    label: str
    seed: int
    records: list[Record]
    arrays: dict[str, list[float]] = field(default_factory=dict)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric."""
        lines = [line for line in self.records if metric in line]
        return [line["step"] for line in lines], [line[metric] for line in lines]

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
            raise Missing(f"{self.label} has no {metric}")
        return values

    def share(self, holds: Callable[[Record], bool], metric: str) -> float:
        """Share of the lines with a metric in which `holds` is true."""
        lines = [line for line in self.records if metric in line]
        if not lines:
            raise Missing(f"{self.label} has no {metric}")
        return sum(map(holds, lines)) / len(lines)


class Runs(dict[str, Outcome]):
    """Runs of one seed, by label; a label without a run raises Missing."""

    def __missing__(self, label: str) -> Outcome:
        raise Missing(f"no run {label}")


def metric_difference(metric: str, more: str, less: str) -> Callable[[Runs], float]:
    """The last value of a metric in the run `more`, less that in `less`; without a sample size."""
    return lambda runs: runs[more].last(metric) - runs[less].last(metric)


@dataclass(frozen=True)
class Column:
    """A number of each run in the study's table; runs that lack it raise Missing."""

    title: str  # with the unit
    value: Callable[[Runs, str], float]  # of the run with a label
    digits: int = 2


def final(title: str, metric: str, digits: int = 2) -> Column:
    """Column of the last value of a metric."""
    return Column(title, lambda runs, label: runs[label].last(metric), digits)


def mean(title: str, metric: str, digits: int = 2) -> Column:
    """Column of the mean of a metric over the logged steps."""
    return Column(title, lambda runs, label: runs[label].mean(metric), digits)


@dataclass(frozen=True)
class Study:
    """Experiments of a paper, at a size that anyone can run."""

    name: str
    title: str
    paper: str
    setting: str  # model, data and training, and the differences from the paper
    jobs: Callable[[int, Size], list[Job]]  # of a seed; few or short ones if `size.quick`
    training: dict[str, Any]  # sections of the config that all jobs share
    metrics: tuple[str, ...]  # in the result file
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    draw: Callable[[Sequence[Runs]], Figure]
    caption: str  # of the picture
    sft_data: str = "pairs"  # kind of the data, whose warm-up part the SFT warm-up uses
    sft_loss: str | dict[str, Any] = "sft"  # objective of the SFT warm-up
    sft_steps: int = 150  # of 16 rows
    held_out: str = "pairs"  # kind of the pairs on which every trained model is scored
    model_lr: float = 2e-5  # learning rate of all jobs where they start from a pretrained model
    by_epoch: bool = False  # log, evaluate and export once an epoch
    takes_groups: bool = True  # accepts a user's groups instead of generated ones
    # Changed fields of sizes by name, with ", pretrained" where runs start from such a model.
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load(name: str) -> Study:
    """The study of `fastpref.reproduce.papers.NAME`."""
    study: Study = import_module(f"fastpref.reproduce.papers.{name}").STUDY
    return study


def spread(values: Sequence[float], form: str) -> str:
    """`mean (minimum to maximum)` in a format such as `.2f`; a single value is shown alone."""
    mean, low, high = (
        f"{value:{form}}".replace("-", "−")
        for value in (statistics.fmean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
