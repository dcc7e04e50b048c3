"""Files that are whole or absent: written beside, then renamed; and hashes of what they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # a killed process may have had this number
    try:
        yield temporary
        replace(path, temporary)
    finally:
        _remove(temporary)


def replace(path: Path, temporary: Path) -> None:
    """Have a complete file or folder on disk and move it onto `path`, in the same folder."""
    _sync_tree(temporary)
    if path.is_dir():
        old = temporary.with_suffix(".old")
        _remove(old)
        os.replace(path, old)
        os.replace(temporary, path)
        _remove(old)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync_tree(entry)
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of entries, on disk before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(*parts: str | bytes) -> str:
    """Hex digest of the parts, each prefixed by its length so that no two splits collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
