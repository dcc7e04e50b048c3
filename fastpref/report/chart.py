"""Chart types and the formatting of numbers and sentences in their readings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fastpref.report.runs import Run


@dataclass(frozen=True)
class Chart:
    """Figure of some runs, and a reading in words with one line for each run."""

    figure: Figure
    reading: str


@dataclass(frozen=True)
class ChartSpec:
    """Kind of chart on a report page.

    name: stem of its files.
    draw: draws all runs of a report, colored by position; None if no run has the metrics.
    needs: required metrics, and the config fields that enable them.
    """

    name: str
    title: str
    draw: Callable[[Sequence[Run]], Chart | None]
    needs: str


def number(x: float) -> str:
    """Format a number with three significant digits, or all digits from 1,000 on."""
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return text.replace("-", "−")


def moved(first: float, last: float, unit: str = "") -> str:
    """Describe a change, such as `fell from 2 to 1 nats`."""
    start, end = number(first), number(last)
    unit = f" {unit}" if unit else ""
    if start == end:
        return f"stayed at {end}{unit}"
    return f"{'rose' if last > first else 'fell'} from {start} to {end}{unit}"


def sentence(runs: Sequence[Run], parts: dict[str, str]) -> str:
    """Join the readings of the runs: a sentence for one run, a named line each for several."""
    if len(runs) == 1:
        (text,) = parts.values()
        return f"{text[0].upper()}{text[1:]}."
    return "\n".join(f"{name}: {text}." for name, text in parts.items())
