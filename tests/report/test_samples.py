"""Samples in a report: the first and the last evaluation side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref.report import page
from fastpref.report.runs import load
from fastpref.report.samples import Sample, sample_tables
from tests.helpers import report_runs


def line(step: int, prompt: str, completion: str, finished: bool = True) -> dict[str, Any]:
    return {
        "step": step, "prompt": prompt, "completion": completion, "tokens": 3, "finished": finished,
    }  # fmt: skip


def run_with(folder: Path, lines: list[dict[str, Any]]) -> Path:
    report_runs.write(folder, report_runs.run([report_runs.trained(1)]))
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def test_first_and_last_evaluation_are_side_by_side(tmp_path: Path) -> None:
    lines = [line(s, p, f" {p}{s}", s < 20) for s in (0, 10, 20) for p in ("a", "b")]
    (table,) = sample_tables(load([run_with(tmp_path / "run", lines)]))
    assert table.steps == [0, 20] and table.left_out == 0
    assert table.samples == [Sample("a", ["a0", "a20 …"]), Sample("b", ["b0", "b20 …"])]


def test_one_evaluation_is_one_column_and_more_prompts_are_counted(tmp_path: Path) -> None:
    lines = [line(0, f"prompt {k}", "x") for k in range(13)]
    (table,) = sample_tables(load([run_with(tmp_path / "run", lines)]))
    assert table.steps == [0] and len(table.samples) == 10 and table.left_out == 3


def test_texts_of_samples_are_no_markup_of_the_page(tmp_path: Path) -> None:
    lines = [line(0, "<|im_start|>user", "<script>alert(1)</script>")]
    text = page.html(load([run_with(tmp_path / "run", lines)]), [], [], False)
    assert "<h2>Samples</h2>" in text and "&lt;|im_start|&gt;user" in text
    assert "<script>alert" not in text


def test_runs_without_samples_or_with_damaged_ones_have_no_table(tmp_path: Path) -> None:
    first, second = run_with(tmp_path / "a", []), run_with(tmp_path / "b", [{"step": 1}])
    (second / "samples.jsonl").write_text("{broken\n")
    runs = load([first, second])
    assert sample_tables(runs) == []
    assert "<h2>Samples" not in page.html(runs, [], [], False)
