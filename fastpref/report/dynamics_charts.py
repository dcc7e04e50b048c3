"""Pictures of what a run does to the two log-probs of a pair, a panel a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastpref.report.chart import Drawn, number, sentence
from fastpref.report.line_charts import STEPS, draw_series, side_entries
from fastpref.report.runs import Run, Series, Values
from fastpref.report.style import DASHES, INK, LINE, colour, legend, name_panel, panels

PATHWAYS = {  # of Table 2, arXiv:2604.18239, and their shades
    "chosen up, rejected down": "#2da44e",
    "both down": "#cf4a4a",
    "both up": "#d4a017",
    "chosen down, rejected up": "#8a63d2",
}
_SHADE = {"alpha": 0.22, "linewidth": 0}
_CENTRE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.2}
_BEFORE: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "linewidth": 1.2}
_SPANS = 12  # stretches of a run that have a pathway each: shorter ones are noise


class Source(NamedTuple):
    """Log-probs of the two sides, as some runs have them and others do not."""

    metric: str  # with {side}
    pairs: str
    least: int  # points for a curve
    change: bool  # against a reference, so that 0 is where the run began

    def sides(self, run: Run) -> list[Series]:
        """Chosen and rejected; of single responses, some lines may have but one of them."""
        return run.together(*(self.metric.format(side=side) for side in DASHES))

    def serves(self, runs: Sequence[Run]) -> bool:
        return all(len(self.sides(run)[0].steps) >= self.least for run in runs)


# Best first: an evaluation sees the same pairs each time, a step of training others.
SOURCES = (
    Source("eval_logps/{side}_change", "held-out pairs", 4, True),
    Source("logps/{side}_change", "training pairs", 1, True),
    Source("eval_logps/{side}", "held-out pairs", 4, False),
    Source("logps/{side}", "training pairs", 1, False),
)


def logps(runs: Sequence[Run]) -> Drawn | None:
    """Chosen and rejected log-probs over the pathway that they are on."""
    source = next((each for each in SOURCES if each.serves(runs)), None)
    if source is None:
        return None
    figure, axes = panels(len(runs), 1.9, sharex=True, sharey=True)
    parts: dict[str, str] = {}
    met: set[str] = set()
    for position, (run, axis) in enumerate(zip(runs, axes, strict=True)):
        chosen, rejected = source.sides(run)
        for series, dashes in zip((chosen, rejected), DASHES.values(), strict=True):
            draw_series(axis, series, colour(position), dashes)
        for start, end, pathway in pathways(chosen.steps, chosen.values, rejected.values):
            axis.axvspan(start, end, color=PATHWAYS[pathway], **_SHADE)
            met.add(pathway)
        parts[run.name] = _displacement(
            *(each.ends[1] - (0 if source.change else each.ends[0]) for each in (chosen, rejected))
        )
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(STEPS)
    axes[0].margins(x=0)
    figure.supylabel(f"log-prob{' change' * source.change} (nats)", fontsize="medium")
    shades = [(name, _patch(shade)) for name, shade in PATHWAYS.items() if name in met]
    legend(figure, side_entries() + shades)
    return Drawn(figure, f"{sentence(runs, parts)}\nShown are {source.pairs}.")


def pathways(steps: Values, chosen: Values, rejected: Values) -> list[tuple[float, float, str]]:
    """(first step, last step, pathway) of stretches of a run, by where the two log-probs move.

    steps, chosen, rejected: (N,). Means over at most thirteen parts of the run are compared with
    the next; neighbours on the same pathway are one stretch.
    """
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _SPANS + 1))
    means = [tuple(float(x[part].mean()) for x in (steps, chosen, rejected)) for part in parts]
    found: list[tuple[float, float, str]] = []
    for (start, w, l), (end, next_w, next_l) in pairwise(means):  # noqa: E741
        name = pathway(next_w - w, next_l - l)
        if found and found[-1][2] == name:
            start, *_ = found.pop()
        found.append((start, end, name))
    if found:  # the means lie within the run, their stretches cover it
        found[0] = (float(steps[0]), *found[0][1:])
        found[-1] = (found[-1][0], float(steps[-1]), found[-1][2])
    return found


def pathway(chosen: float, rejected: float) -> str:
    """The name of two changes; a log-prob that stands still is where it should be."""
    if chosen >= 0:
        return "chosen up, rejected down" if rejected <= 0 else "both up"
    return "both down" if rejected <= 0 else "chosen down, rejected up"


def band(runs: Sequence[Run]) -> Drawn | None:
    """log r against the Disentanglement Band, with and without Reward Calibration."""
    measured = [
        (position, run) for position, run in enumerate(runs) if len(_log_ratios(run)[0].steps)
    ]
    if not measured:
        return None
    figure, axes = panels(len(measured), 1.9, sharex=True)
    for (position, run), axis in zip(measured, axes, strict=True):
        _draw_band(axis, run, colour(position))
        if len(runs) > 1:
            name_panel(axis, run.name, position)
    axes[-1].set_xlabel(STEPS)
    axes[-1].margins(x=0.02)
    figure.supylabel("log of d_w / d_l (no unit)", fontsize="medium")
    entries = [("log r", LINE), ("band", _patch(INK)), ("its centre log r*", _CENTRE)]
    if any(len(run.series("calibration/log_r").steps) for _, run in measured):
        entries.append(("log r without RC", _BEFORE))
    legend(figure, entries)
    return Drawn(figure, sentence(runs, {run.name: _standing(run) for _, run in measured}))


def _draw_band(axis: Any, run: Run, ink: str) -> None:
    log_r, centre = (series.thinned() for series in _log_ratios(run))
    before = run.series("calibration/log_r").thinned()
    # Infinite, and so not there, while no pair has a positive cosine.
    lower, upper = (series.thinned() for series in run.together("band/lower", "band/upper"))
    axis.fill_between(lower.steps, lower.values, upper.values, color=INK, **_SHADE)
    axis.plot(centre.steps, centre.values, **_CENTRE)
    axis.plot(before.steps, before.values, color=ink, **_BEFORE)
    axis.plot(log_r.steps, log_r.values, color=ink, **LINE)
    # Early on, while the scores are nearly orthogonal, a band can be a hundred times as wide.
    reach = float(np.median(upper.values - lower.values)) if len(lower.steps) else 1.0
    seen = np.concatenate([log_r.values, centre.values, before.values])
    axis.set_ylim(seen.min() - reach, seen.max() + reach)


def _log_ratios(run: Run) -> list[Series]:
    return run.together("band/log_r", "band/log_r_star")


def _displacement(chosen: float, rejected: float) -> str:
    """`chosen fell by 12.3 nats while rejected fell by 20.1: both down`."""

    def by(change: float) -> str:
        return f"{'rose' if change >= 0 else 'fell'} by {number(abs(change))}"

    return f"chosen {by(chosen)} nats while rejected {by(rejected)}: {pathway(chosen, rejected)}"


def _standing(run: Run) -> str:
    inside, (log_r, centre) = run.series("band/inside"), _log_ratios(run)
    off = log_r.ends[1] - centre.ends[1]
    side = "above" if off >= 0 else "below"
    return (
        f"{inside.values.mean():.0%} of the pairs were inside the band, {inside.ends[1]:.0%} at "
        f"the end, with log r {number(abs(off))} {side} its centre"
    )


def _patch(shade: str) -> dict[str, Any]:
    return {"color": shade, "linewidth": 8, "alpha": _SHADE["alpha"] + 0.1}
