"""One run at a time writes a run directory: a lock that ends with the process that holds it.

The kernel holds it (`flock`), so whoever is killed leaves no lock behind. On a file system without
such locks the file itself counts: a process of this machine that is gone is passed over, one of
another machine cannot be asked and counts as alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fastpref import distributed
from fastpref.config import ConfigError


class InUse(ConfigError):
    """Another run writes the same run directory."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, no other run writes `folder`, which is made if it is not there.

    The first rank holds the lock for all. Raises InUse, with the process and host that hold it.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"training.output_dir: {error.filename}: {error.strerror}; choose another folder"
        ) from None
    mine = False
    try:
        mine = distributed.is_main_process() and _take(descriptor)
        if not distributed.all_ranks(mine or not distributed.is_main_process()):
            raise InUse(_refusal(folder, _holder(descriptor)))
        yield
    finally:
        if mine:
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        if _may_be_alive(_holder(descriptor)):
            return False
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    """Who took the lock last; empty if it was given back, or at this moment is being taken."""
    try:
        about: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return about


def _may_be_alive(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != socket.gethostname():
        return bool(holder)
    if holder["pid"] == os.getpid():  # given anew: in a container it may be 1 each time
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = "process {pid} on {host} since {since}".format(**holder) if holder else "another process"
    return (
        f"training.output_dir: {folder} is in use by {who}; end that run or choose another folder "
        f"(if it is gone, remove {folder / 'lock'})"
    )
