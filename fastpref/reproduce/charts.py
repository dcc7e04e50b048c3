"""Parts of the studies' pictures, in the style of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastpref.report.chart import number
from fastpref.report.style import COLORS, INK, Entry, color, legend, panels, settings
from fastpref.reproduce.study import Runs

__all__ = ["COLORS", "INK", "curves", "dots", "legend", "panels", "save", "symlog"]

_SIZES = {"seed": 12, "mean": 34}


def dots(
    axis: Any,
    seeds: Sequence[Runs],
    rows: Sequence[Sequence[str]],
    value: Callable[[Runs, str], float],  # of the run with a label
    unit: str,
) -> None:
    """Plot a line for each row of labels: a small dot for each seed, a large one for the mean.

    The labels of a row lie closely below each other, in colors by their position in the row.
    """
    for line, row in enumerate(rows):
        for position, label in enumerate(row):
            y = line + 0.3 * (position - (len(row) - 1) / 2)
            values = [value(runs, label) for runs in seeds if label in runs]
            style = {"color": color(position), "linewidths": 0}
            axis.scatter(values, [y] * len(values), s=_SIZES["seed"], alpha=0.5, **style)
            axis.scatter(np.mean(values), y, s=_SIZES["mean"], zorder=3, **style)
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
    """Plot a line for each label, the mean of the seeds, in a band from minimum to maximum.

    Colors follow the position of a label in `order`, or in `labels`. Returns legend entries.
    """
    entries = []
    for label in labels:
        position = (order or labels).index(label)
        steps, _ = seeds[0][label].series(metric)
        values = np.array([runs[label].series(metric)[1] for runs in seeds])
        axis.plot(steps, values.mean(0), color=color(position), linewidth=1.6)
        low, high = values.min(0), values.max(0)
        axis.fill_between(steps, low, high, color=color(position), alpha=0.15, linewidth=0)
        entries.append((label, {"color": color(position), "linewidth": 3}))
    axis.set_ylabel(unit)
    return entries


def symlog(axis: Any) -> None:
    """Set a symmetric log scale: for numbers close to zero and far from it, on either side."""
    axis.set_xscale("symlog", linthresh=1)
    decades = [10.0**k for k in range(5)]
    axis.xaxis.set_major_locator(FixedLocator([*(-x for x in decades), 0, *decades]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: number(x))


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw and write a picture."""
    with settings(path.name):
        draw().savefig(path, dpi=150)
