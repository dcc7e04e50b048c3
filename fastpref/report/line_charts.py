"""Charts of metrics over the optimizer steps, with all runs in one panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.report.chart import Chart, moved, number, sentence
from fastpref.report.runs import Run, Series
from fastpref.report.style import DASHES, LINE, Entry, color, legend, panels, run_entries

STEPS = "optimizer step"
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": ""}


@dataclass(frozen=True)
class LineChart:
    """Line chart of one metric, or of a metric for chosen and rejected responses.

    subject: subject of the reading's sentence.
    metric: name of the metric; `{side}` in it stands for chosen and rejected.
    label: label of the vertical axis, with the unit.
    unit: unit in the reading.
    held_out: whether to draw evaluations as dots in addition to the training line.
    """

    subject: str
    metric: str
    label: str
    unit: str = ""
    held_out: bool = True
    log: bool = False

    def draw(self, runs: Sequence[Run]) -> Chart | None:
        sides = list(DASHES) if "{side}" in self.metric else [""]
        figure, (axis,) = panels()
        parts: dict[str, str] = {}
        has_dots = False
        for position, run in enumerate(runs):
            readings = []
            for side in sides:
                metric = self.metric.format(side=side)
                trained, held_out = run.series(metric), run.series(f"eval_{metric}")
                if self.held_out and len(held_out.steps):
                    axis.plot(*held_out.thinned(100)[:2], color=color(position), **_DOTS)
                    has_dots = True
                draw_series(axis, trained, color(position), DASHES.get(side, "-"))
                reading = ""
                if len(trained.steps):
                    reading = f"{side or self.subject} {moved(*trained.ends, self.unit)}"
                if self.held_out and len(held_out.steps):
                    evaluation = f"last evaluation: {number(held_out.values[-1])}"
                    reading = f"{reading} ({evaluation})" if reading else evaluation
                if reading:
                    readings.append(reading)
            if readings:
                parts[run.name] = ", ".join(readings)
        if not parts:
            return None
        if self.log:
            axis.set_yscale("log")
        axis.set(xlabel=STEPS, ylabel=self.label)
        axis.margins(x=0.02)
        entries = run_entries([run.name for run in runs])
        entries += side_entries() if len(sides) > 1 else []
        entries += [("training", LINE), ("held-out data", _DOTS)] if has_dots else []
        legend(figure, entries)
        return Chart(figure, sentence(runs, parts))


def draw_series(axis: Any, series: Series, ink: str, dashes: Any = "-") -> None:
    """Draw a line; if it is downsampled, draw means over the range of the averaged values."""
    thin = series.thinned()
    if len(thin.steps) < len(series.steps):
        axis.fill_between(thin.steps, thin.low, thin.high, color=ink, alpha=0.15, linewidth=0)
    axis.plot(thin.steps, thin.values, color=ink, linestyle=dashes, **LINE)


def side_entries() -> list[Entry]:
    """Legend entries of chosen and rejected."""
    return [(side, {**LINE, "linestyle": dashes}) for side, dashes in DASHES.items()]
