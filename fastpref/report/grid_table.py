"""Table of a grid for the terminal: one row for each run, with its values and final metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from fastpref.config.grid import value_text
from fastpref.report.runs import Run, load
from fastpref.report.tables import Cell, Measure, comparisons, metric_row

# A terminal has place for the metrics that runs are chosen by; the report page has all.
MEASURES = (
    Measure("loss", "loss"),
    Measure("rewards/accuracies", "accuracy", "higher"),
    Measure("rewards/margins", "margin"),
    Measure("preference/accuracy", "accuracy on p", "higher"),
    Measure("preference/mean_kl", "KL to p", "lower"),
    Measure("preference/pci", "PCI", "higher"),
)
_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def grid_table(folder: Path) -> Table:
    """Table of `folder/grid.json`: metrics of the finished runs, with a star at the best ones."""
    grid: dict[str, Any] = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    finished = [entry["name"] for entry in grid["runs"] if entry["status"] == "finished"]
    runs = load([folder / name for name in finished]) if finished else []
    headings, columns = _metric_columns(runs)
    table = Table(*grid["keys"], "run", "step")
    for heading in headings:
        table.add_column(heading, justify="right")
    cells = dict(zip(finished, zip(*columns, strict=True), strict=True)) if columns else {}
    for entry in grid["runs"]:
        step = entry["metrics"].get("step")
        table.add_row(
            *map(_value, entry["values"].values()),
            entry["status"],
            "–" if step is None else f"{step:,}",
            *map(_text, cells.get(entry["name"], [Cell("–")] * len(headings))),
        )
    return table


def _metric_columns(runs: list[Run]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and cells of the metrics that any of the runs has."""
    headings, columns = [], []
    for comparison in comparisons(runs, MEASURES) if runs else ():
        measure = comparison.measure
        prefix = "eval " if comparison.held_out else ""
        headings.append(f"{prefix}{measure.label}{_ARROWS[measure.better]}")
        columns.append(metric_row(comparison).cells)
    return headings, columns


def _text(cell: Cell) -> str:
    return f"{cell.text} ★" if cell.best else cell.text


def _value(value: Any) -> str:
    return value if isinstance(value, str) else value_text(value)
