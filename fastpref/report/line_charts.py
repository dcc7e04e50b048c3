"""Pictures of metrics against the optimizer step, all runs in one panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.report.chart import Drawn, moved, number, sentence
from fastpref.report.runs import Run, Series
from fastpref.report.style import DASHES, LINE, Entry, colour, legend, panels, run_entries

STEPS = "optimizer step"
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": ""}


@dataclass(frozen=True)
class Lines:
    """One metric, or the chosen and the rejected one of two.

    label: of the vertical axis, with the unit.
    unit: as the reading says it.
    held_out: whether to draw the evaluations' dots beside the line of training.
    """

    metric: str  # `{side}` in it stands for chosen and rejected
    label: str
    unit: str = ""
    held_out: bool = True
    log: bool = False

    def draw(self, runs: Sequence[Run]) -> Drawn | None:
        sides = list(DASHES) if "{side}" in self.metric else [""]
        figure, (axis,) = panels()
        parts: dict[str, str] = {}
        dotted = False
        for position, run in enumerate(runs):
            said = []
            for side in sides:
                metric = self.metric.format(side=side)
                trained, held_out = run.series(metric), run.series(f"eval_{metric}")
                if self.held_out and len(held_out.steps):
                    axis.plot(*held_out.thinned(100)[:2], color=colour(position), **_DOTS)
                    dotted = True
                draw_series(axis, trained, colour(position), DASHES.get(side, "-"))
                if len(trained.steps):
                    said.append(f"{side} {moved(*trained.ends, self.unit)}".strip())
                if self.held_out and len(held_out.steps):
                    said.append(f"held-out {number(held_out.values[-1])}")
            if said:
                parts[run.name] = ", ".join(said)
        if not parts:
            return None
        if self.log:
            axis.set_yscale("log")
        axis.set(xlabel=STEPS, ylabel=self.label)
        axis.margins(x=0.02)
        entries = run_entries([run.name for run in runs])
        entries += side_entries() if len(sides) > 1 else []
        entries += [("training", LINE), ("held-out data", _DOTS)] if dotted else []
        legend(figure, entries)
        return Drawn(figure, sentence(runs, parts))


def draw_series(axis: Any, series: Series, ink: str, dashes: Any = "-") -> None:
    """A line of means, over the range of what they are means of where it was thinned."""
    thin = series.thinned()
    if len(thin.steps) < len(series.steps):
        axis.fill_between(thin.steps, thin.low, thin.high, color=ink, alpha=0.15, linewidth=0)
    axis.plot(thin.steps, thin.values, color=ink, linestyle=dashes, **LINE)


def side_entries() -> list[Entry]:
    return [(side, {**LINE, "linestyle": dashes}) for side, dashes in DASHES.items()]
