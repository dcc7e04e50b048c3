"""Atomic writes of files and directories (temporary path, fsync, rename), and checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The umask can only be read by setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Context manager that yields a temporary path and moves it to `path` on success.

    scratch: folder of the temporary path, on the file system of `path`; default: that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    # A killed process may have had the same process id.
    remove(temporary)
    try:
        yield temporary
        replace(path, temporary)
    finally:
        remove(temporary)


def replace(path: Path, temporary: Path) -> None:
    """Sync a complete file or directory to disk and rename it to `path` on the same file system."""
    _sync_tree(temporary)
    if path.is_dir():
        old = temporary.with_suffix(".old")
        remove(old)
        os.replace(path, old)
        os.replace(temporary, path)
        remove(old)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


def discard(folder: Path) -> None:
    """Delete a directory atomically: a kill at any time leaves it either complete or absent."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    os.replace(folder, old)
    remove(old)


def clear_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes; no other process may be writing to `folder`."""
    for pattern in (".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or directory if it exists; symlinks are unlinked, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Sync a file or directory tree to disk, with file modes by the umask.

    safetensors creates files that only their owner can read.
    """
    if path.is_dir():
        for entry in path.iterdir():
            _sync_tree(entry)
    else:
        path.chmod(0o666 & ~_UMASK)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file, or a directory's list of entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(*parts: str | bytes) -> str:
    """Hex digest of the parts, each prefixed with its length so that no two splits collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_crc32(path: Path) -> int:
    """CRC-32 of a file: fast enough for large files, detects damage, is no identity of content."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
