"""Two runs with the same run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config, ConfigError
from fastpref.training import run_lock
from fastpref.training.run_lock import InUse
from tests.helpers.training_runs import told

HOST = socket.gethostname()
MakeConfig = Callable[..., Config]


def test_the_second_run_is_refused_and_told_of_the_first(make_config: MakeConfig) -> None:
    config = make_config(training__steps=1)
    folder = Path(config.training.output_dir)
    message = rf"{folder} is in use by process {os.getpid()} on {re.escape(HOST)} since \d{{4}}-"
    with run_lock.hold(folder):
        with pytest.raises(InUse, match=message):
            told(config)
        assert [path.name for path in folder.iterdir()] == ["lock"]
    told(config)
    assert (folder / "lock").read_text() == ""


def test_a_run_that_fails_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_lock.hold(tmp_path):
        raise RuntimeError
    with run_lock.hold(tmp_path):
        pass


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, int]:
    """Folder with the lock file of a killed process, and the pid of that process."""
    child = os.fork()
    if child == 0:
        with run_lock.hold(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == child
    return tmp_path, child


def test_a_killed_process_leaves_no_lock(killed: tuple[Path, int]) -> None:
    with run_lock.hold(killed[0]):
        assert json.loads((killed[0] / "lock").read_text())["pid"] == os.getpid()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_of_the_file_system_the_file_counts(
    killed: tuple[Path, int], no_flock: None
) -> None:
    folder, _ = killed
    with run_lock.hold(folder):  # the holder is gone
        pass

    def write(**changes: Any) -> None:
        about = {"pid": os.getppid(), "host": HOST, "since": "today", **changes}
        (folder / "lock").write_text(json.dumps(about))

    write()
    with pytest.raises(InUse, match=f"process {os.getppid()} on"), run_lock.hold(folder):
        pass
    write(host="elsewhere")
    message = f"on elsewhere since today; .*if it is gone, remove {folder / 'lock'}"
    with pytest.raises(InUse, match=message), run_lock.hold(folder):
        pass
    write(pid=os.getpid())  # a process that has ended had the same pid
    with run_lock.hold(folder):
        pass


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Read-only folder; root could write to it, and becomes nobody for the test."""
    folder, user = tmp_path / "read-only", os.geteuid()
    folder.mkdir(mode=0o500)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_one_line(read_only: Path) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"^training.output_dir: .*: Permission denied; choose another"
        ),
        run_lock.hold(read_only / "run"),
    ):
        pass
