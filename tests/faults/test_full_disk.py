"""Full disks and limits of file size."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpref.training.checkpoint_files import CheckpointError
from tests.helpers.training_runs import assert_same, config_of, told

CHECKPOINT = 540_000  # bytes: weights and two moments of 45k parameters
# A separate name space, in which an ordinary user may mount.
OWN = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be larger than a third of a checkpoint (EFBIG, where a full disk is ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT // 3, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_is_one_line(
    tiny_llama: str, tmp_path: Path, small_files: None
) -> None:
    config = config_of(tiny_llama, tmp_path, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"^cannot write .*/step-2: .*File too large"):
        told(config)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def can_mount() -> bool:
    try:
        return subprocess.run([*OWN, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs user name spaces")
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tiny_llama: str, tmp_path: Path) -> None:
    """The disk first has room for the checkpoint of step 2 only, then for all."""
    told(config_of(tiny_llama, tmp_path, tmp_path / "whole"))
    disk = tmp_path / "disk"
    disk.mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(config_of(tiny_llama, tmp_path, disk / "run").to_yaml())
    train = f"'{sys.executable}' -W ignore -m fastpref train '{config}'"
    script = f"""
        mount -t tmpfs -o size={CHECKPOINT * 3 // 2} none '{disk}'
        {train}
        echo "exit code $?"
        ls -A '{disk}/run/checkpoints'
        mount -o remount,size={CHECKPOINT * 9} '{disk}'
        {train} resume=auto && cp -r '{disk}/run' '{tmp_path}/resumed'
    """
    done = subprocess.run(
        [*OWN, "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout
    assert "No space left on device\nexit code 2\nstep-2\n" in done.stdout
    assert f"resumed from {disk}/run/checkpoints/step-2" in done.stdout
    assert "Traceback" not in done.stdout
    assert_same(tmp_path / "resumed", tmp_path / "whole")
