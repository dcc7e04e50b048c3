"""`fastpref train --grid` as a person meets it: its arguments, output and exit codes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.cli import train
from fastpref.config import Config
from fastpref.utils.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(make_config: Callable[..., Config], tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(make_config(training__steps=1).to_yaml())
    return str(path)


def test_a_dry_run_prints_the_folders(fastpref: Command, config: str, tmp_path: Path) -> None:
    done = fastpref("train", config, "--dry-run", "--grid", "loss.beta=0.1,0.2", "optim.lr=1e-5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/run/beta=0.1\n{tmp_path}/run/beta=0.2\n"
    assert not (tmp_path / "run").exists()


def test_a_grid_ends_with_a_table_a_file_and_a_report(
    fastpref: Command, config: str, tmp_path: Path
) -> None:
    done = fastpref("train", config, "--grid", "optim.lr=1e30,1e-3", "training.steps=3")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "run 2 of 2: lr=0.001" in lines
    cells = [line.replace("│", " ").split() for line in lines if line.startswith("│")]
    assert [row[:3] for row in cells] == [["1e30", "diverged", "1"], ["0.001", "finished", "3"]]
    folder = tmp_path / "run"
    assert lines[-2:] == [f"grid: {folder}/grid.json", f"report: {folder}/report.html"]


def test_a_grid_with_a_failed_run_ends_with_exit_code_two(
    fastpref: Command, config: str, tmp_path: Path
) -> None:
    done = fastpref("train", config, "--grid", "data.max_length=64,2")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: 1 of 2 runs failed, see {tmp_path}/run/grid.json; fix the cause and run the same "
        "command\n"
    )
    assert "failed: " in done.stdout and "│ 2               │ failed" in done.stdout


def test_a_grid_without_metrics_has_no_report(
    fastpref: Command, config: str, tmp_path: Path
) -> None:
    command = ("train", config, "--grid", "optim.lr=1e30,1e31", "training.steps=3")
    assert fastpref(*command).returncode == 0
    for path in (tmp_path / "run").glob("*/metrics.jsonl"):
        path.unlink()
    done = fastpref(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("│ diverged │ –    │") == 2
    assert done.stdout.endswith(f"grid: {tmp_path}/run/grid.json\n")


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [3.0])])
def test_the_first_rank_reports_first(
    monkeypatch: pytest.MonkeyPatch, rank: str, waits: list[float]
) -> None:
    """An error of another rank alone is not lost; torchrun ends the rank where both have one."""
    slept: list[float] = []
    monkeypatch.setattr(train.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(UserError) as caught, train.refused_once():
        raise UserError("data.train: no such file")
    assert slept == waits and caught.value.should_print
