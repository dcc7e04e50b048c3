"""Lock that lets one run at a time write to a run directory.

The kernel releases the lock (`flock`) when the process ends, even if it is killed. On a file system
without flock the content of the file is the lock: a holder on this host counts only while its
process is alive, and a holder on another host always counts.
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
from fastpref.training.rank_checks import check_shared


class InUse(ConfigError):
    """Another run is writing to the run directory."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Context manager that locks `folder`, and creates it if needed.

    Rank 0 holds the lock for all ranks, which must see its files. Raises InUse, with the process
    and host of the holder, and ConfigError for a folder that cannot be used.
    """
    descriptor, error = _open(folder) if distributed.is_main_process() else (None, None)
    acquired = descriptor is not None and _acquire(descriptor)
    try:
        if descriptor is not None and not acquired:
            error = InUse(_refusal(folder, _holder(descriptor)))
        told = distributed.broadcast(
            None if error is None else (isinstance(error, InUse), str(error))
        )
        if told is not None:
            raise (InUse if told[0] else ConfigError)(told[1])
        check_shared(folder)
        yield
    finally:
        if descriptor is not None:
            if acquired:
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _open(folder: Path) -> tuple[int | None, ConfigError | None]:
    """Create the folder and open its lock file, or say why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644), None
    except OSError as error:
        return None, ConfigError(
            f"training.output_dir: {error.filename}: {error.strerror}; choose another folder"
        )


def _acquire(descriptor: int) -> bool:
    """Try to lock the file and write the holder into it; return whether it is locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # The file system does not support flock.
    except OSError:
        if _may_be_alive(_holder(descriptor)):
            return False
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    """Metadata of the last holder; empty if the lock is released or being acquired."""
    try:
        holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder is running, or is on another host."""
    if not holder or holder["host"] != socket.gethostname():
        return bool(holder)
    # A previous process had the same pid: in a container it may be 1 every time.
    if holder["pid"] == os.getpid():
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
