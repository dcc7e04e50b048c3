"""Damaged checkpoints and moved run directories."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.config import Config, ConfigError
from fastpref.training import checkpoint_files
from fastpref.training.checkpoint_files import CheckpointError
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.training_runs import assert_same, config_of, flip, told

SHARD = "shard-00001-model-00001-of-00001.safetensors"
Again = Callable[..., Config]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Data, their cache, and a finished run with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    told(config_of(tiny_llama, folder, folder / "whole"))
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """Copy of the run, to be damaged."""
    return Path(shutil.copytree(home / "whole", tmp_path / "run"))


@pytest.fixture
def again(home: Path, run: Path, tiny_llama: str) -> Again:
    """Config of the copied run, with changes."""
    return lambda **changes: config_of(tiny_llama, home, **{"run": run, **changes})


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (SHARD, lambda path: flip(path, -100), f"{SHARD} is damaged"),
        (SHARD, halved, f"{SHARD} is damaged"),
        (SHARD, Path.unlink, f"{SHARD} is missing"),
        ("state.json", lambda path: flip(path, 50), "state.json is damaged"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("checksums.json", halved, "checksums.json is damaged"),
        ("checksums.json", Path.unlink, "checksums.json is missing"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_continued(
    home: Path, run: Path, again: Again, name: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = run / "checkpoints" / "step-6"
    damage(folder / name)
    text = told(again(resume="auto"))
    assert f"{folder} is skipped: {message}" in text
    assert f"resumed from {run / 'checkpoints' / 'step-4'}" in text
    assert_same(run, home / "whole")


def test_no_flipped_bit_goes_unseen(run: Path) -> None:
    root, notes = run / "checkpoints", list[str]()
    for path in sorted((root / "step-6").iterdir()):
        size = path.stat().st_size
        for position in range(0, size, max(1, size // 40)):
            flip(path, position)
            assert checkpoint_files.find(root, "auto", notes.append) == root / "step-4"
            flip(path, position)
    assert len(notes) > 100
    assert checkpoint_files.find(root, "auto", notes.append) == root / "step-6"


def test_without_an_undamaged_checkpoint_a_run_does_not_start_over(run: Path, again: Again) -> None:
    for step in (4, 6):
        halved(run / "checkpoints" / f"step-{step}" / SHARD)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*remove th"):
        told(again(resume="auto"))
    named = str(run / "checkpoints" / "step-4")
    with pytest.raises(CheckpointError, match=r"step-4: shard.* is damaged; use another checkpoi"):
        told(again(resume=named))


def test_checkpoints_without_metrics_are_not_overwritten(run: Path, again: Again) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        told(again())


def test_a_run_goes_on_at_another_path(home: Path, run: Path, again: Again, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-6")
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    run.rename(moved)
    text = told(again(resume="auto", run=moved))
    assert f"resumed from {moved / 'checkpoints' / 'step-4'}" in text
    assert f"changed since the run began: training.output_dir: {home / 'whole'} → {moved}" in text
    assert_same(moved, home / "whole")


def test_clocks_decide_nothing(run: Path, again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint looks older than the one before, and the clock was set back."""
    checkpoints = run / "checkpoints"
    os.utime(checkpoints / "step-6", (0, 0))
    monkeypatch.setattr(time, "time", lambda: 1e6)
    text = told(again(resume="auto", steps=8))
    assert f"resumed from {checkpoints / 'step-6'}" in text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-6", "step-8"]


def test_going_back_drops_the_later_checkpoints_before_the_first_step(
    run: Path, again: Again, display: Display
) -> None:
    """Otherwise a run that is killed then would resume from a checkpoint without metrics."""
    Trainer(again(resume=str(run / "checkpoints" / "step-4")), display)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]


def test_what_killed_processes_left_is_removed(run: Path, again: Again) -> None:
    for name in (".model.1.tmp", ".model.1.old", "checkpoints/.step-4.old", "checkpoints/.step-7"):
        (run / name).mkdir()
        (run / name / "half").write_text("x")
    (run / ".metrics.jsonl.1.tmp").write_text("x")
    told(again(resume="auto", steps=8))
    assert not list(run.rglob(".*"))
