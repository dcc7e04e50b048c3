"""Rounds in a report: a table with a column for each, and a chart."""

from __future__ import annotations

from pathlib import Path

from fastpref.report import page, rounds
from fastpref.report.runs import Run
from tests.helpers.report_runs import config, trained

RECORDS = [
    {"round": 0, "step": 0, "eval_reward": 1.0, "kl_to_start": 0.0},
    {"round": 1, "step": 4, "reward": 0.5, "pairs": 7, "eval_reward": 1.5, "eval_win_rate": 0.625},
    {"round": 2, "step": 8, "reward": 0.75, "pairs": 6, "eval_reward": 2.0, "eval_win_rate": 0.75},
]


def run_of(name: str, records: list[dict[str, float]]) -> Run:
    return Run(name, config(), [trained(1), trained(2)], (), records)


def test_a_table_has_a_column_for_each_round() -> None:
    (table,) = rounds.round_tables([run_of("a", RECORDS), run_of("b", [])])
    assert (table.run, table.rounds) == ("a", [0, 1, 2])
    rows = {row.label: [cell.text for cell in row.cells] for row in table.rows}
    assert rows == {
        "score on held-out prompts": ["1", "1.5", "2"],
        "win rate against the start": ["–", "0.625", "0.75"],
        "KL to the start (nats per completion)": ["0", "–", "–"],
        "score of the samples": ["–", "0.5", "0.75"],
        "pairs": ["–", "7", "6"],
    }


def test_the_page_has_the_chart_and_its_reading(tmp_path: Path) -> None:
    text = page.write([run_of("a", RECORDS)], tmp_path).read_text(encoding="utf-8")
    assert "Score, held-out rose from 1 to 2, win rate rose from 0.625 to 0.75" in text
    assert "<h2>Rounds</h2>" in text and (tmp_path / "report" / "rounds.png").is_file()


def test_a_run_without_rounds_has_neither() -> None:
    runs = [run_of("b", [])]
    assert rounds.round_tables(runs) == [] and rounds.CHART.draw(runs) is None
