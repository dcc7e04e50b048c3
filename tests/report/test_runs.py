"""Run directories in a report: series, names, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastpref.report.runs import load, names, run_folders
from fastpref.utils.errors import UserError
from tests.helpers.report_runs import full, run, trained, write


def test_a_thinned_series_keeps_the_mean_and_the_extremes() -> None:
    values = np.random.default_rng(0).normal(size=10_007)
    example = run([{"step": k + 1, "loss": float(v)} for k, v in enumerate(values)])
    thin = example.series("loss").thinned()
    assert len(thin.steps) == 1000
    sizes = np.diff(np.linspace(0, 10_007, 1001).astype(int))
    assert thin.values @ sizes == pytest.approx(values.sum())
    assert thin.steps @ sizes == pytest.approx(np.arange(1, 10_008).sum())
    assert (thin.low.min(), thin.high.max()) == (values.min(), values.max())
    assert (thin.low <= thin.values).all() and (thin.values <= thin.high).all()
    assert (np.diff(thin.steps) > 0).all()


def test_a_short_series_is_left_alone() -> None:
    series = full().series("loss")
    assert series.thinned() is series
    assert series.steps.tolist() == list(range(1, 21))


def test_values_that_are_no_finite_numbers_are_left_out() -> None:
    values = [1.0, math.nan, math.inf, None, {"counts": []}, 3]
    example = run([{"step": k, "x": value} for k, value in enumerate(values)] + [{"step": 9}])
    assert example.series("x").values.tolist() == [1.0, 3.0]
    assert example.series("x").steps.tolist() == [0.0, 5.0]
    assert len(example.series("y").steps) == 0
    assert (example.last("x"), example.last("y"), example.step) == (3, None, 9)


def test_the_ends_are_means_of_a_tenth() -> None:
    example = run([{"step": k, "x": float(k)} for k in range(40)])
    assert example.series("x").ends == (1.5, 37.5)
    assert full().series("eval_preference/accuracy").ends == (0.5, 0.7)


def test_names_are_as_short_as_tells_runs_apart() -> None:
    assert names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert names([Path("x/a"), Path("y/a"), Path("y/b")]) == ["x/a", "y/a", "y/b"]


def test_settings_are_fields_of_two_levels() -> None:
    example = full(adapter={"name": "lora", "r": 4}).settings
    assert (example["adapter.r"], example["loss.name"], example["calibration"]) == ("4", "dpo", "–")


def test_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = full(optim={"lr": 3e-5})
    (loaded,) = load([write(tmp_path / "a", written)])
    assert (loaded.name, loaded.records) == ("a", written.records)
    assert loaded.config.optim.lr == 3e-5


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", full())
    with pytest.raises(UserError, match="good: is given twice"):
        load([good, tmp_path / "x" / ".." / "good"])
    with pytest.raises(UserError, match=r"nothing: not a run directory; expected one with config"):
        load([good, tmp_path / "nothing"])
    empty = write(tmp_path / "empty", run([]))
    with pytest.raises(UserError, match=r"empty/metrics\.jsonl: holds no metrics yet; wait for"):
        load([empty])
    for damage in ("{'step': 1}\n", "[1]\n", json.dumps({"loss": 1}) + "\n"):
        (empty / "metrics.jsonl").write_text(json.dumps(trained(1)) + "\n" + damage)
        with pytest.raises(UserError, match=r"metrics\.jsonl: expected a JSON object with a step"):
            load([empty])
    (good / "config.yaml").write_text("optim: {lr: -1}")
    with pytest.raises(UserError, match=r"good: the config of the run cannot be read: .*missing"):
        load([good])


def test_a_folder_of_runs_is_its_runs_in_natural_order(tmp_path: Path) -> None:
    names = ["lr=1e-6", "lr=5e-7", "lr=10", "lr=2", "beta=0.1", "beta=0.05"]
    for name in names:
        write(tmp_path / "grid" / name, full())
    write(tmp_path / "grid" / "begun", run([]))
    (tmp_path / "grid" / "report").mkdir()
    alone = write(tmp_path / "alone", full())
    folders = run_folders([tmp_path / "grid", alone])
    expected = ["beta=0.05", "beta=0.1", "lr=5e-7", "lr=1e-6", "lr=2", "lr=10", "alone"]
    assert [folder.name for folder in folders] == expected
    with pytest.raises(UserError, match=r"lr=2: is given twice"):
        load(run_folders([tmp_path / "grid", tmp_path / "grid" / "lr=2"]))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: not a run directory; .*, or a folder of such"):
        load(run_folders([tmp_path / "empty"]))
    write(tmp_path / "grid" / "a", run([]))
    with pytest.raises(UserError, match=r"a/metrics\.jsonl: holds no metrics yet"):
        load(run_folders([tmp_path / "grid"]))


def test_folders_of_runs_are_looked_through(tmp_path: Path) -> None:
    for name in ("b", "grid/lr=2", "grid/lr=10", "a", "a/exports/inner", "1/2/3/too-deep"):
        write(tmp_path / name, full(steps=3))
    folders = [str(folder.relative_to(tmp_path)) for folder in run_folders([tmp_path])]
    assert folders == ["a", "b", "grid/lr=2", "grid/lr=10"]
