"""Answers of a judge on disk: one JSON object a line, each synced before the next is asked for.

A killed process leaves at most one incomplete line, which the next one removes. One process at a
time holds the file (`flock`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpref.utils.errors import UserError

_START = b'{"key": "'


class Cache:
    """Records by key: those on disk and those of `add`."""

    def __init__(self, path: Path, descriptor: int, records: dict[str, dict[str, Any]]) -> None:
        self.path, self.records = path, records
        self._descriptor = descriptor

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record and sync it to disk."""
        line = json.dumps({"key": key, **record}, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.records[key] = record


@contextmanager
def open_cache(path: Path, option: str = "--cache") -> Iterator[Cache]:
    """Open a cache file, and create it if needed. option: that names the file, for messages.

    Raises UserError if another process holds the file, or if it is not a cache.
    """
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{option}: {path} is in use by another process; wait for it, or name another file"
            ) from None
        except OSError as error:  # a file system without locks
            raise UserError(
                f"{option}: {path} cannot be locked ({error.strerror}); name a file on a local disk"
            ) from None
        yield Cache(path, descriptor, _records(option, path, descriptor))
    finally:
        os.close(descriptor)


def _records(option: str, path: Path, descriptor: int) -> dict[str, dict[str, Any]]:
    *lines, rest = path.read_bytes().split(b"\n")
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record.pop("key")] = record
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{option}: {path}, line {number}: not an answer of a judge; remove the line, or "
                "name another file"
            ) from None
    if rest:
        # A file of something else must not lose its last line.
        if rest[: len(_START)] != _START[: len(rest)]:
            raise UserError(f"{option}: {path} is not a cache of judge; name another file")
        os.ftruncate(descriptor, sum(len(line) + 1 for line in lines))
    return records
