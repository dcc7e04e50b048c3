"""Table of a grid in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpref.report.grid_table import grid_table
from tests.helpers.report_runs import run, trained, write


def shown(folder: Path) -> list[list[str]]:
    """Cells of the table, row by row; the headings first."""
    text = io.StringIO()
    Console(file=text, width=200).print(grid_table(folder), markup=False)
    lines = [line for line in text.getvalue().splitlines() if line[0] in "┃│"]
    return [
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines
    ]


def grid(folder: Path, *runs: tuple[Any, str, float | None]) -> Path:
    """Folder of a grid: value, status and accuracy of each run, which is None without metrics."""
    entries = []
    for k, (value, status, accuracy) in enumerate(runs):
        record = trained(3) | {"step": 1200, "eval_loss": 0.6, "eval_rewards/accuracies": accuracy}
        if accuracy is not None:
            write(folder / f"run-{k}", run([record]))
        entry = {"name": f"run-{k}", "values": {"loss.beta": value, "x": "[a/b]"}, "status": status}
        entries.append({**entry, "metrics": {} if accuracy is None else {"step": 1200}})
    (folder / "grid.json").write_text(json.dumps({"keys": ["loss.beta", "x"], "runs": entries}))
    return folder


def test_the_best_of_the_finished_runs_has_a_star(tmp_path: Path) -> None:
    folder = grid(
        tmp_path,
        (0.05, "finished", 0.5),
        (1e-5, "finished", 0.75),
        (1.0, "diverged", 0.9),
        ([1, 2], "waiting", None),
    )
    assert shown(folder) == [
        ["loss.beta", "x", "run", "step", "eval loss ↓", "eval accuracy ↑", "margin"],
        ["0.05", "[a/b]", "finished", "1,200", "0.6", "0.5", "0.15"],
        ["1e-5", "[a/b]", "finished", "1,200", "0.6", "0.75 ★", "0.15"],
        ["1", "[a/b]", "diverged", "1,200", "–", "–", "–"],
        ["[1,2]", "[a/b]", "waiting", "–", "–", "–", "–"],
    ]


def test_a_grid_without_a_finished_run_has_no_metrics(tmp_path: Path) -> None:
    folder = grid(tmp_path, (0.05, "failed", None), (0.1, "diverged", 0.5))
    assert shown(folder) == [
        ["loss.beta", "x", "run", "step"],
        ["0.05", "[a/b]", "failed", "–"],
        ["0.1", "[a/b]", "diverged", "1,200"],
    ]
