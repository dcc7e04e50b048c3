"""Tables of final metrics and of config differences."""

from __future__ import annotations

from typing import Any

from fastpref.report.runs import Run
from fastpref.report.tables import TableRow, differences, final_metrics, foremost
from tests.helpers.report_runs import full, run


def rows(*records: list[dict[str, Any]]) -> dict[str, TableRow]:
    runs = [run(lines, str(k)) for k, lines in enumerate(records)]
    return {row.label: row for row in final_metrics(runs)}


def best(row: TableRow) -> list[bool]:
    return [cell.best for cell in row.cells]


def test_the_best_is_the_highest_or_the_lowest_or_none() -> None:
    first = {"step": 9, "rewards/accuracies": 0.7, "preference/mean_kl": 0.1, "loss": 0.2}
    second = {"step": 9, "rewards/accuracies": 0.9, "preference/mean_kl": 0.3, "loss": 0.1}
    table = rows([first], [second])
    assert best(table["accuracy of rewards"]) == [False, True]
    assert best(table["mean KL to p (nats)"]) == [True, False]
    assert best(table["loss"]) == [False, False] and table["loss"].better == ""


def test_what_rounding_makes_equal_is_equal() -> None:
    lines = [[{"step": 1, "rewards/accuracies": x}] for x in (0.70001, 0.5, 0.7)]
    assert best(rows(*lines)["accuracy of rewards"]) == [True, False, True]
    assert best(rows(*lines[::2])["accuracy of rewards"]) == [False, False]


def test_a_single_run_has_no_best() -> None:
    assert not any(cell.best for row in final_metrics([full()]) for cell in row.cells)


def test_the_last_value_held_out_if_any_run_has_that() -> None:
    lines = [{"step": 1, "entropy": 1.0}, {"step": 2, "entropy": 3.0}]
    table = rows(lines, lines)
    assert [cell.text for cell in table["entropy (nats per token)"].cells] == ["3", "3"]
    table = rows([*lines, {"step": 2, "eval_entropy": 5.0}], lines)
    assert [c.text for c in table["entropy (nats per token), held-out"].cells] == ["5", "–"]
    assert [c.text for c in table["optimizer steps"].cells] == ["2", "2"]


def test_speed_is_the_median() -> None:
    lines = [{"step": k, "tokens_per_second": v} for k, v in enumerate((100.0, 900.0, 200.0))]
    assert rows(lines)["tokens per second, median"].cells[0].text == "200"


def test_configs_differ_where_a_field_does() -> None:
    runs: list[Run] = [
        full("a", training={"output_dir": "x"}),
        full(
            "b", training={"output_dir": "y"}, optim={"lr": 5e-4}, loss={"name": "dpo", "beta": 0.2}
        ),
    ]
    table = {row.label: [cell.text for cell in row.cells] for row in differences(runs)}
    assert table["optim.lr"] == ["1e-06", "0.0005"]
    assert table["loss.beta"] == ["–", "0.2"]
    assert set(table) == {"optim.lr", "loss.beta"}
    assert differences(runs[:1]) == []


def test_a_held_out_loss_has_a_best_where_the_objective_is_the_same() -> None:
    lines = [[{"step": 1, "loss": 0.1, "eval_loss": loss}] for loss in (0.7, 0.5)]
    runs = [run(records, str(k), optim={"lr": 1 + k}) for k, records in enumerate(lines)]
    row = final_metrics(runs)[1]
    assert (row.label, row.better, best(row)) == ("loss, held-out", "lower", [False, True])
    for changed in (
        {"loss": {"name": "dpo", "beta": 0.2}},
        {"model": {"path": "other"}},
        {"data": {"train": "t.jsonl", "eval": "other.jsonl"}},
    ):
        row = final_metrics([runs[0], run(lines[1], "b", **changed)])[1]
        assert (row.label, row.better, best(row)) == ("loss, held-out", "", [False, False])


def test_the_foremost_runs_are_the_best_by_the_first_measure_with_a_direction() -> None:
    values = [0.5, 0.9, 0.7, None, 0.7]
    lines: list[list[dict[str, Any]]] = [
        [{"step": 1, "loss": k} | ({} if value is None else {"rewards/accuracies": value})]
        for k, value in enumerate(values)
    ]
    runs = [run(records, str(k)) for k, records in enumerate(lines)]
    chosen, measure = foremost(runs, 2)
    assert ([r.name for r in chosen], measure) == (["1", "2"], "accuracy of rewards")
    assert [r.name for r in foremost(runs, 4)[0]] == ["0", "1", "2", "4"]
    assert foremost([run([{"step": 1, "loss": 1.0}], "a")] * 3, 2)[1] == ""
