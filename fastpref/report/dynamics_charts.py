"""Charts of the chosen and rejected log-probs during training, one panel per run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastpref.report.chart import Chart, number, sentence
from fastpref.report.line_charts import STEPS, draw_series, side_entries
from fastpref.report.runs import Run, Series, Values
from fastpref.report.style import DASHES, INK, LINE, color, legend, name_panel, panels

# Pathways of Table 2, arXiv:2604.18239, and their background colors.
PATHWAYS = {
    "chosen up, rejected down": "#2da44e",
    "both down": "#cf4a4a",
    "both up": "#d4a017",
    "chosen down, rejected up": "#8a63d2",
}
# Shares of pairs: what they are called, and the color of the pathway.
_PAIR_PATHWAYS = {
    "pair_band/inside": ("inside", PATHWAYS["chosen up, rejected down"]),
    "pair_band/both_down": ("both down", PATHWAYS["both down"]),
    "pair_band/both_up": ("both up", PATHWAYS["both up"]),
    "pair_band/crossed": ("crossed", PATHWAYS["chosen down, rejected up"]),
}
_SHADE = {"alpha": 0.22, "linewidth": 0}
_CENTER: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.2}
_STEP: dict[str, Any] = {"alpha": 0.5, "linewidth": 0.9}
_BEFORE: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "linewidth": 1.2}
_SPANS = 12  # most segments of a run with a pathway each; shorter segments are noise


class Source(NamedTuple):
    """Metric from which the log-probs are drawn, if all runs have it."""

    metric: str  # with {side}
    pairs: str
    min_points: int
    change: bool  # relative to a reference, so that the run starts at 0

    def sides(self, run: Run) -> list[Series]:
        """Series of chosen and rejected, at the steps that have both."""
        return run.aligned(*(self.metric.format(side=side) for side in DASHES))

    def is_available(self, runs: Sequence[Run]) -> bool:
        """Whether all runs have enough points for a curve."""
        return all(len(self.sides(run)[0].steps) >= self.min_points for run in runs)


# In order of preference: evaluations measure the same pairs each time, training steps do not.
SOURCES = (
    Source("eval_logps/{side}_change", "held-out pairs", 4, True),
    Source("logps/{side}_change", "training pairs", 1, True),
    Source("eval_logps/{side}", "held-out pairs", 4, False),
    Source("logps/{side}", "training pairs", 1, False),
)


def logps(runs: Sequence[Run]) -> Chart | None:
    """Draw chosen and rejected log-probs, with the pathway as background color."""
    source = next((candidate for candidate in SOURCES if candidate.is_available(runs)), None)
    if source is None:
        return None
    figure, axes = panels(len(runs), 1.9, sharex=True, sharey=True)
    parts: dict[str, str] = {}
    shown_pathways: set[str] = set()
    for position, (run, axis) in enumerate(zip(runs, axes, strict=True)):
        chosen, rejected = source.sides(run)
        for series, dashes in zip((chosen, rejected), DASHES.values(), strict=True):
            draw_series(axis, series, color(position), dashes)
        for start, end, pathway in pathways(chosen.steps, chosen.values, rejected.values):
            axis.axvspan(start, end, color=PATHWAYS[pathway], **_SHADE)
            shown_pathways.add(pathway)
        parts[run.name] = _displacement(
            *(
                series.ends[1] - (0 if source.change else series.ends[0])
                for series in (chosen, rejected)
            )
        )
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(STEPS)
    axes[0].margins(x=0)
    quantity = "log-prob change" if source.change else "log-prob"
    figure.supylabel(f"{quantity} (nats)", fontsize="medium")
    shades = [(name, _patch(shade)) for name, shade in PATHWAYS.items() if name in shown_pathways]
    legend(figure, side_entries() + shades)
    return Chart(figure, f"{sentence(runs, parts)}\nThe chart shows {source.pairs}.")


def pathways(steps: Values, chosen: Values, rejected: Values) -> list[tuple[float, float, str]]:
    """Split a run into (first step, last step, pathway) segments.

    steps, chosen, rejected: (N,). The run is divided into at most thirteen parts, and the means of
    adjacent parts are compared. Adjacent segments with the same pathway are merged.
    """
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _SPANS + 1))
    means = [tuple(float(x[part].mean()) for x in (steps, chosen, rejected)) for part in parts]
    segments: list[tuple[float, float, str]] = []
    for (start, w, l), (end, next_w, next_l) in pairwise(means):  # noqa: E741
        name = pathway(next_w - w, next_l - l)
        if segments and segments[-1][2] == name:
            start, *_ = segments.pop()
        segments.append((start, end, name))
    # The means lie inside the run: extend the outer segments to its ends.
    if segments:
        segments[0] = (float(steps[0]), *segments[0][1:])
        segments[-1] = (segments[-1][0], float(steps[-1]), segments[-1][2])
    return segments


def pathway(chosen: float, rejected: float) -> str:
    """Name of the pathway of two changes; no change counts as the desired direction."""
    if chosen >= 0:
        return "chosen up, rejected down" if rejected <= 0 else "both up"
    return "both down" if rejected <= 0 else "chosen down, rejected up"


def band(runs: Sequence[Run]) -> Chart | None:
    """Draw log r and the Disentanglement Band of the batch, with and without calibration."""
    measured = [
        (position, run) for position, run in enumerate(runs) if len(_log_ratios(run)[0].steps)
    ]
    if not measured:
        return None
    figure, axes = panels(len(measured), 1.9, sharex=True)
    for (position, run), axis in zip(measured, axes, strict=True):
        _draw_band(axis, run, color(position))
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(STEPS)
    axes[-1].margins(x=0.02)
    figure.supylabel("log of d_w / d_l (no unit)", fontsize="medium")
    entries = [("log r", LINE), ("band", _patch(INK)), ("its center log r*", _CENTER)]
    if any(len(run.series("band/log_r_average").steps) for _, run in measured):
        entries[:1] = [("log r", _STEP), ("its moving average", LINE)]
    if any(len(run.series("calibration/log_r").steps) for _, run in measured):
        entries.append(("log r without RC", _BEFORE))
    legend(figure, entries)
    return Chart(figure, sentence(runs, {run.name: _band_reading(run) for _, run in measured}))


def _draw_band(axis: Any, run: Run, ink: str) -> None:
    log_r, center = (series.thinned() for series in _log_ratios(run))
    before = run.series("calibration/log_r").thinned()
    # The edges are infinite, and therefore missing, while no batch has a positive cosine.
    lower, upper = (series.thinned() for series in run.aligned("band/lower", "band/upper"))
    axis.fill_between(lower.steps, lower.values, upper.values, color=INK, **_SHADE)
    axis.plot(center.steps, center.values, **_CENTER)
    axis.plot(before.steps, before.values, color=ink, **_BEFORE)
    average = run.series("band/log_r_average").thinned()
    if len(average.steps):  # of older runs there is none
        axis.plot(log_r.steps, log_r.values, color=ink, **_STEP)
    line = average if len(average.steps) else log_r
    axis.plot(line.steps, line.values, color=ink, **LINE)
    # Early in training the scores are nearly orthogonal and the band can be 100 times as wide.
    reach = float(np.median(upper.values - lower.values)) if len(lower.steps) else 1.0
    values = np.concatenate([log_r.values, center.values, before.values])
    axis.set_ylim(values.min() - reach, values.max() + reach)


def pair_pathways(runs: Sequence[Run]) -> Chart | None:
    """Draw the shares of pairs on each pathway, by the bands of the pairs themselves."""
    measured = [
        (position, run, shares)
        for position, run in enumerate(runs)
        if len((shares := run.aligned(*_PAIR_PATHWAYS))[0].steps)
    ]
    if not measured:
        return None
    figure, axes = panels(len(measured), 1.6, sharex=True)
    names, colors = zip(*_PAIR_PATHWAYS.values(), strict=True)
    readings = {}
    for (position, run, shares), axis in zip(measured, axes, strict=True):
        thinned = [series.thinned() for series in shares]
        axis.stackplot(
            thinned[0].steps, *(series.values for series in thinned), colors=colors, alpha=0.45
        )
        axis.set_ylim(0, 1)
        if len(runs) > 1:
            name_panel(axis, run.name, position)
        means = [series.values.mean() for series in shares]
        readings[run.name] = ", ".join(
            f"{mean:.0%} {name}" for mean, name in zip(means, names, strict=True)
        )
    axes[-1].set_xlabel(STEPS)
    axes[-1].margins(x=0.02)
    figure.supylabel("pairs (share)", fontsize="medium")
    legend(figure, [(name, _patch(shade)) for name, shade in _PAIR_PATHWAYS.values()])
    return Chart(figure, sentence(runs, readings))


def _log_ratios(run: Run) -> list[Series]:
    return run.aligned("band/log_r", "band/log_r_star")


def _displacement(chosen: float, rejected: float) -> str:
    """Describe two changes: `chosen fell by 12.3 nats while rejected fell by 20.1: both down`."""

    def by(change: float) -> str:
        return f"{'rose' if change >= 0 else 'fell'} by {number(abs(change))}"

    return f"chosen {by(chosen)} nats while rejected {by(rejected)}: {pathway(chosen, rejected)}"


def _band_reading(run: Run) -> str:
    inside, (log_r, center) = run.series("band/inside"), _log_ratios(run)
    offset = log_r.ends[1] - center.ends[1]
    side = "above" if offset >= 0 else "below"
    return (
        f"the batch was inside its band in {inside.values.mean():.0%} of the measured steps; at "
        f"the end log r was {number(abs(offset))} {side} the band's center"
    )


def _patch(shade: str) -> dict[str, Any]:
    return {"color": shade, "linewidth": 8, "alpha": _SHADE["alpha"] + 0.1}
