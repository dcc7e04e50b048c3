"""Style of charts: sizes for a phone, one color per run, and a text color that a page can replace.

An SVG inside a page has no background and the text color of the page, so it suits light and dark
mode; chart files have a white background. The colors of runs have a contrast ratio of at least 3
on both (a test checks this).
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

INK, PAPER = "#24292f", "#ffffff"  # text and background of chart files; replaced in pages
COLORS = ("#2f81c7", "#c9690a", "#17935f", "#c2478f", "#8a63d2", "#cf4a4a", "#1490a0", "#83811a")
DASHES = {"chosen": "-", "rejected": (0, (4, 1.5))}
LINE = {"linewidth": 1.6, "solid_capstyle": "round"}
_WIDTH = 4.2  # inches; at the width of a phone, a point is a little more than a pixel
_ROW = 0.19  # inches, height of a legend row
_NAME = 40  # characters of a run's name that fit in a line
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
Entry = tuple[str, dict[str, Any]]  # legend entry: text and line style


def settings(salt: str = "") -> Any:
    """Context manager with the matplotlib settings; `salt` makes SVG ids unique in a page."""
    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})


def panels(count: int = 1, height: float = 2.3, **options: Any) -> tuple[Figure, list[Any]]:
    """Figure with `count` panels below each other, each `height` inches high."""
    figure = Figure(figsize=(_WIDTH, 0.55 + height * count))
    axes = figure.subplots(count, squeeze=False, **options)[:, 0]
    return figure, list(axes)


def in_lines(name: str) -> str:
    """Name of a run in lines that fit into a chart."""
    return "\n".join(name[start : start + _NAME] for start in range(0, len(name), _NAME))


def color(position: int) -> str:
    """Color of the run at a position of the report."""
    return COLORS[position]


def name_panel(axis: Any, name: str, position: int) -> None:
    """Set the name of a run as the title of its panel, in its color."""
    title = axis.set_title("", color=color(position), fontweight="bold")
    title.set_parse_math(False)  # a name may contain dollar signs
    title.set_text(in_lines(name))


def run_entries(names: Sequence[str]) -> list[Entry]:
    """Legend entries of the runs; none for a single run."""
    styles = [{"color": color(k), "linewidth": 3} for k in range(len(names))]
    return list(zip(map(in_lines, names), styles, strict=True)) if len(names) > 1 else []


def legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """Add a legend below the panels, in as many columns as fit; the figure grows."""
    if not entries:
        return
    handles = [Line2D([], [], **{"color": INK, **line_style}) for _, line_style in entries]
    lines = [text.split("\n") for text, _ in entries]
    columns = max(1, 60 // (max(len(line) for text in lines for line in text) + 6))
    # Texts of several lines leave room for one column only.
    rows = sum(map(len, lines)) if columns == 1 else -(-len(entries) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _ROW * rows)
    box = figure.legend(handles, [" "] * len(entries), loc="outside lower left", ncols=columns)
    # Set afterwards: matplotlib parses labels with dollars as math and skips labels that begin
    # with "_".
    for label, (text, _) in zip(box.get_texts(), entries, strict=True):
        label.set_parse_math(False)
        label.set_text(text)


def write(figure: Figure, path: Path) -> str:
    """Write `path`.png and `path`.svg, and return the SVG for a page."""
    with settings(path.name):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        # The layout is already computed; repeating it takes half of the time.
        figure.set_layout_engine("none")
        figure.savefig(path.with_suffix(".png"), dpi=200)
    svg = buffer.getvalue()
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    return inline(svg)


def inline(svg: str) -> str:
    """Convert an SVG of matplotlib to a page element with the size and colors of the page."""
    body = svg[svg.index("<svg") :].replace(INK, "currentColor")
    body = body.replace(f"fill: {PAPER}", "fill: none")
    # These ids are not referenced, and they repeat between charts.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[^"]*pt"', "", body, count=2)
