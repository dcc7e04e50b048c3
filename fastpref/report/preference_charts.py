"""Pictures of held-out pairs: contrastive logits, calibration, and what accuracy costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb

from fastpref.report.chart import Drawn, moved, number, sentence
from fastpref.report.line_charts import STEPS
from fastpref.report.runs import Run
from fastpref.report.style import INK, Entry, colour, legend, name_panel, panels, run_entries

_MARGIN: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
_COLUMNS = 24  # evaluations of a heat map, at most
_MASS = 0.99  # share of the pairs that it shows: the rest would squeeze them


def contrast(runs: Sequence[Run]) -> Drawn | None:
    """Histogram of contrastive logits at each evaluation, as a heat map, with StaPO's margins."""
    found = [
        (position, run, run.histograms("eval_contrast/histogram"))
        for position, run in enumerate(runs)
    ]
    found = [each for each in found if each[2]]
    if not found:
        return None
    figure, axes = panels(len(found), 1.9, sharex=True)
    parts: dict[str, str] = {}
    entries: list[Entry] = []
    for (position, run, histograms), axis in zip(found, axes, strict=True):
        shown = [histograms[k] for k in _spread(len(histograms), _COLUMNS)]
        _heat(axis, shown, colour(position))
        low, high = _view([histogram for _, histogram in shown], run.config.margins)
        axis.set_ylim(low, high)
        for margin in run.config.margins:
            if low <= margin <= high:
                axis.axhline(margin, color=INK, **_MARGIN)
                entries = [("margins", _MARGIN)]
        per_token = "" if run.config.build_loss().needs_reference else " per token"
        axis.set_ylabel(f"Z (nats{per_token})")
        axis.grid(False)
        parts[run.name] = _shares(run)
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(f"{STEPS} (darker: more pairs)")
    legend(figure, entries)
    return Drawn(figure, sentence(runs, parts))


def calibration(runs: Sequence[Run]) -> Drawn | None:
    """Predicted against target preference probability at the last evaluation, in bins."""
    figure, (axis,) = panels(height=2.9)
    axis.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    parts: dict[str, str] = {}
    for position, run in enumerate(runs):
        sums = run.last("eval_preference/calibration")
        if sums is None:
            continue
        counts, predicted, target = (np.array(sums[k]) for k in ("count", "predicted", "target"))
        used = counts > 0
        x, y, share = predicted[used] / counts[used], target[used] / counts[used], counts[used]
        axis.plot(x, y, color=colour(position), linewidth=1)
        sizes = 8 + 120 * share / share.sum()
        axis.scatter(x, y, s=sizes, color=colour(position), alpha=0.85, linewidths=0)
        error = np.abs(predicted - target).sum() / counts.sum()
        sure = "sure" if np.abs(x - 0.5) @ share >= np.abs(y - 0.5) @ share else "unsure"
        parts[run.name] = f"predictions are off by {number(error)} on average, {sure}r than p"
    if not parts:
        return None
    axis.set(
        xlabel="predicted probability of chosen (mean of a bin)",
        ylabel="target probability (mean)",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    entries = run_entries([run.name for run in runs])
    legend(figure, [*entries, ("predicted = target", {"linestyle": ":", "linewidth": 1})])
    return Drawn(figure, sentence(runs, parts))


def trade_off(runs: Sequence[Run]) -> Drawn | None:
    """Accuracy and the preference collapse index against the KL divergence, over evaluations."""
    names = [f"eval_preference/{name}" for name in ("mean_kl", "accuracy", "pci")]
    paths = {
        run.name: (position, [series.values for series in run.together(*names)])
        for position, run in enumerate(runs)
        if len(run.together(*names)[0].steps)
    }
    if not paths:
        return None
    figure, axes = panels(2, 1.9, sharex=True)
    for position, (kl, *others) in paths.values():
        for axis, values in zip(axes, others, strict=True):
            axis.plot(kl, values, color=colour(position), linewidth=1, alpha=0.7)
            axis.scatter(kl[-1], values[-1], color=colour(position), s=42, zorder=3, linewidths=0)
    every = np.concatenate([values[0] for _, values in paths.values()])
    if every.min() > 0 and every.max() > 20 * every.min():
        axes[0].set_xscale("log")
    axes[0].set_ylabel("accuracy (share)")
    axes[1].set(xlabel="mean KL to the target (nats)", ylabel="PCI (probability)")
    end = {"linestyle": "", "marker": "o", "markersize": 6}
    legend(figure, [*run_entries([run.name for run in runs]), ("last evaluation", end)])
    return Drawn(figure, _best({name: values for name, (_, values) in paths.items()}))


def _best(paths: dict[str, list[Any]]) -> str:
    if len(paths) == 1:
        ((kl, accuracy, pci),) = paths.values()
        said = [moved(values[0], values[-1]) for values in (accuracy, kl, pci)]
        return f"Accuracy {said[0]}, the KL {said[1]} nats, and PCI {said[2]}."
    wanted = (("Accuracy is highest", 1, max), ("the KL lowest", 0, min), ("PCI highest", 2, max))
    said = []
    for words, column, choose in wanted:
        name = choose(paths, key=lambda name: paths[name][column][-1])
        said.append(f"{words} with {name} ({number(paths[name][column][-1])})")
    return ", ".join(said) + "."


def _heat(axis: Any, histograms: list[tuple[int, dict[str, Any]]], ink: str) -> None:
    """A column for each evaluation; the bin with the most pairs of it has the full colour."""
    steps = np.array([step for step, _ in histograms], dtype=np.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    half = max(steps[-1] - steps[0], 1) / 2 / max(len(steps) - 1, 1)
    walls = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    shades = LinearSegmentedColormap.from_list("", [(*to_rgb(ink), alpha) for alpha in (0, 1)])
    for k, (_, histogram) in enumerate(histograms):
        counts = np.array(histogram["counts"])[:, None]
        filled = np.sqrt(counts / max(counts.max(), 1))  # the root keeps thin tails in sight
        axis.pcolormesh(
            walls[k : k + 2], histogram["edges"], filled, cmap=shades, vmin=0, vmax=1, linewidth=0
        )


def _view(histograms: list[dict[str, Any]], margins: tuple[float, float]) -> tuple[float, float]:
    """The range of Z that has all but a few pairs, and the margins where they are near."""
    lows, highs = zip(*(_quantiles(histogram) for histogram in histograms), strict=True)
    low, high = min(lows), max(highs)
    reach = (high - low) / 2
    near = [margin for margin in margins if low - reach <= margin <= high + reach]
    return min([low, *near]) - reach / 20, max([high, *near]) + reach / 20


def _quantiles(histogram: dict[str, Any]) -> tuple[float, float]:
    cumulative = np.concatenate([[0], np.cumsum(histogram["counts"])])
    tail = (1 - _MASS) / 2 * cumulative[-1]
    low, high = np.interp([tail, cumulative[-1] - tail], cumulative, histogram["edges"])
    return float(low), float(high)


def _shares(run: Run) -> str:
    below, inside, above = (
        run.last(f"eval_contrast/{name}") or 0.0 for name in ("below", "inside", "above")
    )
    low, high = map(number, run.config.margins)
    return (
        f"at the end Z is below {low} for {below:.0%} of the pairs, up to {high} for {inside:.0%}, "
        f"above for {above:.0%}"
    )


def _spread(count: int, most: int) -> list[int]:
    """At most so many positions of `count`, evenly, with the first and the last."""
    return sorted({*np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()})
