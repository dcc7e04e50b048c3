"""Charts of held-out pairs: contrastive logits, calibration, and accuracy against KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb

from fastpref.report.chart import Chart, moved, number, sentence
from fastpref.report.line_charts import STEPS
from fastpref.report.runs import Run
from fastpref.report.style import INK, Entry, color, legend, name_panel, panels, run_entries

_MARGIN: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
_COLUMNS = 24  # most evaluations in a heat map
_MASS = 0.99  # fraction of the pairs in view; outliers would compress the rest


def contrast(runs: Sequence[Run]) -> Chart | None:
    """Draw a heat map of the contrastive logits at each evaluation, with StaPO's margins."""
    measured = [
        (position, run, histograms)
        for position, run in enumerate(runs)
        if (histograms := run.histograms("eval_contrast/histogram"))
    ]
    if not measured:
        return None
    figure, axes = panels(len(measured), 1.9, sharex=True)
    parts: dict[str, str] = {}
    entries: list[Entry] = []
    for (position, run, histograms), axis in zip(measured, axes, strict=True):
        shown = [histograms[k] for k in _evenly_spaced(len(histograms), _COLUMNS)]
        _heat_map(axis, shown, color(position))
        low, high = _visible_range([histogram for _, histogram in shown], run.config.margins)
        axis.set_ylim(low, high)
        for margin in run.config.margins:
            if low <= margin <= high:
                axis.axhline(margin, color=INK, **_MARGIN)
                entries = [("margins", _MARGIN)]
        per_token = "" if run.config.build_loss().needs_reference else " per token"
        axis.set_ylabel(f"Z (nats{per_token})")
        axis.grid(False)
        parts[run.name] = _contrast_reading(run)
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(f"{STEPS} (darker: more pairs)")
    legend(figure, entries)
    return Chart(figure, sentence(runs, parts))


def calibration(runs: Sequence[Run]) -> Chart | None:
    """Draw predicted against target preference probability at the last evaluation, in bins."""
    figure, (axis,) = panels(height=2.9)
    axis.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    parts: dict[str, str] = {}
    for position, run in enumerate(runs):
        sums = run.last("eval_preference/calibration")
        if sums is None:
            continue
        counts, predicted, target = (np.array(sums[k]) for k in ("count", "predicted", "target"))
        nonempty = counts > 0
        bin_counts = counts[nonempty]
        x, y = predicted[nonempty] / bin_counts, target[nonempty] / bin_counts
        axis.plot(x, y, color=color(position), linewidth=1)
        sizes = 8 + 120 * bin_counts / bin_counts.sum()
        axis.scatter(x, y, s=sizes, color=color(position), alpha=0.85, linewidths=0)
        error = np.abs(predicted - target).sum() / counts.sum()
        # Confidence is the distance of a probability from 1/2, summed over the pairs.
        is_overconfident = np.abs(x - 0.5) @ bin_counts >= np.abs(y - 0.5) @ bin_counts
        confidence = "more" if is_overconfident else "less"
        parts[run.name] = (
            f"predictions are off by {number(error)} on average and {confidence} confident than "
            "the target"
        )
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
    return Chart(figure, sentence(runs, parts))


def trade_off(runs: Sequence[Run]) -> Chart | None:
    """Draw accuracy and preference collapse index against the KL divergence over evaluations."""
    names = [f"eval_preference/{name}" for name in ("mean_kl", "accuracy", "pci")]
    paths = {
        run.name: (position, [series.values for series in run.aligned(*names)])
        for position, run in enumerate(runs)
        if len(run.aligned(*names)[0].steps)
    }
    if not paths:
        return None
    figure, axes = panels(2, 1.9, sharex=True)
    for position, (kl, *others) in paths.values():
        for axis, values in zip(axes, others, strict=True):
            axis.plot(kl, values, color=color(position), linewidth=1, alpha=0.7)
            axis.scatter(kl[-1], values[-1], color=color(position), s=42, zorder=3, linewidths=0)
    every = np.concatenate([values[0] for _, values in paths.values()])
    if every.min() > 0 and every.max() > 20 * every.min():
        axes[0].set_xscale("log")
    axes[0].set_ylabel("accuracy (share)")
    axes[1].set(xlabel="mean KL to the target (nats)", ylabel="PCI (probability)")
    end = {"linestyle": "", "marker": "o", "markersize": 6}
    legend(figure, [*run_entries([run.name for run in runs]), ("last evaluation", end)])
    readings = {name: values for name, (_, values) in paths.items()}
    return Chart(figure, _trade_off_reading(readings))


def _trade_off_reading(paths: dict[str, list[Any]]) -> str:
    """Changes of a single run, or the best of several runs; values are KL, accuracy and PCI."""
    if len(paths) == 1:
        ((kl, accuracy, pci),) = paths.values()
        changes = [moved(values[0], values[-1]) for values in (accuracy, kl, pci)]
        return f"Accuracy {changes[0]}, KL {changes[1]} nats, and PCI {changes[2]}."

    def best(column: int, choose: Any) -> str:
        name = choose(paths, key=lambda name: paths[name][column][-1])
        return f"{name} ({number(paths[name][column][-1])})"

    return (
        f"Accuracy is highest for {best(1, max)}, KL is lowest for {best(0, min)}, and PCI is "
        f"highest for {best(2, max)}."
    )


def _heat_map(axis: Any, histograms: list[tuple[int, dict[str, Any]]], ink: str) -> None:
    """Draw a column for each evaluation; its fullest bin has the full color."""
    steps = np.array([step for step, _ in histograms], dtype=np.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    half = max(steps[-1] - steps[0], 1) / 2 / max(len(steps) - 1, 1)
    edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    shades = LinearSegmentedColormap.from_list("", [(*to_rgb(ink), alpha) for alpha in (0, 1)])
    for k, (_, histogram) in enumerate(histograms):
        counts = np.array(histogram["counts"])[:, None]
        # The square root keeps thin tails visible.
        intensity = np.sqrt(counts / max(counts.max(), 1))
        axis.pcolormesh(
            edges[k : k + 2],
            histogram["edges"],
            intensity,
            cmap=shades,
            vmin=0,
            vmax=1,
            linewidth=0,
        )


def _visible_range(
    histograms: list[dict[str, Any]], margins: tuple[float, float]
) -> tuple[float, float]:
    """Range of Z that contains all but a few pairs, extended to the margins that are near it."""
    lows, highs = zip(*(_quantiles(histogram) for histogram in histograms), strict=True)
    low, high = min(lows), max(highs)
    reach = (high - low) / 2
    near = [margin for margin in margins if low - reach <= margin <= high + reach]
    return min([low, *near]) - reach / 20, max([high, *near]) + reach / 20


def _quantiles(histogram: dict[str, Any]) -> tuple[float, float]:
    """Bounds of the central `_MASS` of a histogram."""
    cumulative = np.concatenate([[0], np.cumsum(histogram["counts"])])
    tail = (1 - _MASS) / 2 * cumulative[-1]
    low, high = np.interp([tail, cumulative[-1] - tail], cumulative, histogram["edges"])
    return float(low), float(high)


def _contrast_reading(run: Run) -> str:
    below, inside, above = (
        run.last(f"eval_contrast/{name}") or 0.0 for name in ("below", "inside", "above")
    )
    low, high = map(number, run.config.margins)
    return (
        f"at the last evaluation Z is below {low} for {below:.0%} of the pairs, from {low} to "
        f"{high} for {inside:.0%}, and above {high} for {above:.0%}"
    )


def _evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices in range(count), with the first and the last."""
    return sorted({*np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()})
