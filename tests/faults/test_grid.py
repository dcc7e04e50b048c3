"""A grid that is killed in its third run goes on there, and ends as one that was not killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from fastpref import cli
from fastpref.training.trainer import Trainer
from tests.helpers import rank_processes
from tests.helpers.training_runs import assert_same, config_of

Command = Callable[..., CompletedProcess[str]]
GRID = ("--grid", "loss.beta=0.05,0.1,0.2", "optim.lr=1e-3,1e-2")
NAMES = [f"beta={beta},lr={lr}" for beta in ("0.05", "0.1", "0.2") for lr in ("0.001", "0.01")]
KILLED = "beta=0.1,lr=0.001"


def killed_in_the_third_run(rank: int, port: int, arguments: tuple[str, ...]) -> None:
    """Run the command line until the fifth step of the third run, one after a checkpoint."""
    torch.set_num_threads(1)
    take = Trainer._train_step

    def step(trainer: Trainer, **options: Any) -> Any:
        if trainer.run.folder.name == KILLED and trainer.step == 4:
            trainer.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return take(trainer, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "_train_step", step)
    patch.setattr(sys, "argv", ["fastpref", *arguments])
    cli.main()


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time and inode of every file of a run."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def test_a_killed_grid_goes_on_where_it_was(
    fastpref: Command, tiny_llama: str, tmp_path: Path
) -> None:
    path, grid, whole = tmp_path / "c.yaml", tmp_path / "grid", tmp_path / "whole"
    path.write_text(config_of(tiny_llama, tmp_path, grid).to_yaml())
    command = ("train", str(path), *GRID)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        rank_processes.start(killed_in_the_third_run, 1, command)
    assert sorted(folder.name for folder in grid.iterdir() if folder.is_dir()) == sorted(NAMES[:3])
    steps = sorted(folder.name for folder in (grid / KILLED / "checkpoints").glob("step-*"))
    assert steps == ["step-2", "step-4"] and not (grid / KILLED / "model").exists()
    before = [versions(grid / name) for name in NAMES[:2]]

    done = fastpref(*command)
    assert done.returncode == 0, done.stderr
    assert [versions(grid / name) for name in NAMES[:2]] == before
    assert f"run 2 of 6: {NAMES[1]}: finished before\n" in done.stdout
    assert f"resumed from {grid / KILLED}/checkpoints/step-4\n" in done.stdout

    uninterrupted = fastpref("train", str(path), f"training.output_dir={whole}", *GRID)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    for name in NAMES:
        assert_same(grid / name, whole / name)
    tables = [
        out.stdout[out.stdout.index("┏") : out.stdout.index("grid: ")]
        for out in (done, uninterrupted)
    ]
    assert tables[0] == tables[1] and tables[0].count("│ finished │ 6    │") == 6
    document = json.loads((grid / "grid.json").read_text())
    assert [run["name"] for run in document["runs"]] == NAMES
    assert {run["status"] for run in document["runs"]} == {"finished"}
    assert {run["metrics"]["step"] for run in document["runs"]} == {6}
    assert all(name in (grid / "report.html").read_text() for name in NAMES)
