"""What the pictures of the studies are made of; they look like those of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastpref.report.chart import number
from fastpref.report.style import COLOURS, INK, Entry, colour, legend, panels, settings
from fastpref.reproduce.study import Outcome, Runs

__all__ = ["COLOURS", "INK", "curves", "dots", "far", "legend", "panels", "save"]

_SIZES = {"each": 12, "mean": 34}


def dots(
    axis: Any,
    seeds: Sequence[Runs],
    rows: Sequence[Sequence[str]],
    value: Callable[[Outcome], float],
    unit: str,
) -> None:
    """A line for each row of labels: a small dot a seed and a large one for the mean.

    The labels of a row lie closely below each other, in colours by their place in it.
    """
    for line, row in enumerate(rows):
        for place, label in enumerate(row):
            y = line + 0.3 * (place - (len(row) - 1) / 2)
            found = [value(runs[label]) for runs in seeds if label in runs]
            look = {"color": colour(place), "linewidths": 0}
            axis.scatter(found, [y] * len(found), s=_SIZES["each"], alpha=0.5, **look)
            axis.scatter(np.mean(found), y, s=_SIZES["mean"], zorder=3, **look)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(unit)
    axis.locator_params(axis="x", nbins=6)


def curves(
    axis: Any,
    seeds: Sequence[Runs],
    labels: Sequence[str],
    metric: str,
    unit: str,
    order: Sequence[str] = (),
) -> list[Entry]:
    """A line for each label, the mean of the seeds, in a band from the least to the most.

    Colours go by the place of a label in `order`, or in `labels`.
    """
    entries = []
    for label in labels:
        position = (order or labels).index(label)
        steps, _ = seeds[0][label].series(metric)
        values = np.array([runs[label].series(metric)[1] for runs in seeds])
        axis.plot(steps, values.mean(0), color=colour(position), linewidth=1.6)
        low, high = values.min(0), values.max(0)
        axis.fill_between(steps, low, high, color=colour(position), alpha=0.15, linewidth=0)
        entries.append((label, {"color": colour(position), "linewidth": 3}))
    axis.set_ylabel(unit)
    return entries


def far(axis: Any) -> None:
    """An axis of numbers that lie close to zero or far from it, on either side."""
    axis.set_xscale("symlog", linthresh=1)
    decades = [10.0**k for k in range(5)]
    axis.xaxis.set_major_locator(FixedLocator([*(-x for x in decades), 0, *decades]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: number(x))


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw and write a picture."""
    with settings(path.name):
        draw().savefig(path, dpi=150)
