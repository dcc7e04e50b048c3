"""How pictures look: sizes for a phone, one colour a run, one ink that a page can exchange.

The SVG of a page has no background and the page's own text colour, so it is right in light and
dark; the files have a white one. Colours of runs have a contrast of 3 or more on both (a test).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, PAPER = "#24292f", "#ffffff"  # of the files; a page exchanges them
COLOURS = ("#2f81c7", "#c9690a", "#17935f", "#c2478f", "#8a63d2", "#cf4a4a", "#1490a0", "#83811a")
DASHES = {"chosen": "-", "rejected": (0, (4, 1.5))}
LINE = {"linewidth": 1.6, "solid_capstyle": "round"}
_WIDTH = 4.2  # inches: at the width of a phone a point is then a little more than a pixel
_ROW = 0.19  # inches, of a legend
_NAME = 26  # characters of a run's name that fit beside its neighbours
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.formatter.limits": (-4, 6),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
         "grid.color"), INK,
    ),
}  # fmt: skip
Entry = tuple[str, dict[str, Any]]  # of a legend: its text, and the look of its line


def settings(salt: str = "") -> Any:
    """The context in which pictures are made and written; `salt` keeps apart the ids of a page."""
    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})


def panels(count: int = 1, height: float = 2.3, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with panels below each other, each of that height in inches."""
    figure = Figure(figsize=(_WIDTH, 0.55 + height * count))
    axes = figure.subplots(count, squeeze=False, **options)[:, 0]
    return figure, list(axes)


def short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def colour(position: int) -> str:
    return COLOURS[position]


def name_panel(axis: Any, name: str, position: int) -> None:
    """The name of a run above its panel, in its colour."""
    title = axis.set_title("", color=colour(position), fontweight="bold")
    title.set_parse_math(False)  # a name may hold dollars
    title.set_text(short(name))


def run_entries(names: Sequence[str]) -> list[Entry]:
    """Legend of the runs; a single one needs none."""
    looks = [{"color": colour(k), "linewidth": 3} for k in range(len(names))]
    return list(zip(map(short, names), looks, strict=True)) if len(names) > 1 else []


def legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """Below the panels, in as many columns as their texts leave room for; the figure grows."""
    if not entries:
        return
    handles = [Line2D([], [], **{"color": INK, **look}) for _, look in entries]
    columns = max(1, 60 // (max(len(text) for text, _ in entries) + 6))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _ROW * -(-len(entries) // columns))
    made = figure.legend(handles, [" "] * len(entries), loc="outside lower left", ncols=columns)
    # Set afterwards: as labels, texts with dollars are formulas, and those with "_" are left out.
    for label, (text, _) in zip(made.get_texts(), entries, strict=True):
        label.set_parse_math(False)
        label.set_text(text)


def write(figure: Figure, path: Path) -> str:
    """Write `path`.png and `path`.svg; returns the SVG for a page."""
    with settings(path.name):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # it has done its work, and takes half of the time
        figure.savefig(path.with_suffix(".png"), dpi=200)
    svg = buffer.getvalue()
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    return inline(svg)


def inline(svg: str) -> str:
    """An SVG of matplotlib as an element of a page: its size and colours are the page's."""
    body = svg[svg.index("<svg") :].replace(INK, "currentColor")
    body = body.replace(f"fill: {PAPER}", "fill: none")
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to them, and they repeat
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[^"]*pt"', "", body, count=2)
