"""What a picture is, and the words that its readings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fastpref.report.runs import Run


@dataclass(frozen=True)
class Drawn:
    """A picture of some runs, and in words what is to be seen: a line for each run."""

    figure: Figure
    reading: str


@dataclass(frozen=True)
class Picture:
    """A kind of picture.

    draw: from all runs of a report; a position in them decides a colour.
    needs: the metrics without which it is left out, and what in a config brings them.
    """

    name: str  # of its files
    title: str
    draw: Callable[[Sequence[Run]], Drawn | None]  # None: no run has what it needs
    needs: str


def number(x: float) -> str:
    """Three digits, and thousands in full."""
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return text.replace("-", "−")


def moved(first: float, last: float, unit: str = "") -> str:
    """`fell from 2 to 1 nats`."""
    start, end = number(first), number(last)
    unit = f" {unit}" if unit else ""
    if start == end:
        return f"stayed at {end}{unit}"
    return f"{'rose' if last > first else 'fell'} from {start} to {end}{unit}"


def sentence(runs: Sequence[Run], parts: dict[str, str]) -> str:
    """What is said of each run; a line each, under its name, where there are several."""
    if len(runs) == 1:
        (text,) = parts.values()
        return f"{text[0].upper()}{text[1:]}."
    return "\n".join(f"{name}: {text}." for name, text in parts.items())
