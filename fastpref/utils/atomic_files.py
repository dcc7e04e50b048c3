"""Files that are whole or absent: written beside, then renamed; and sums of what they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UMASK = os.umask(0o077)  # it cannot be read without being set
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)  # a killed process may have had this number
    try:
        yield temporary
        replace(path, temporary)
    finally:
        remove(temporary)


def replace(path: Path, temporary: Path) -> None:
    """Have a complete file or folder on disk and move it onto `path`, in the same folder."""
    _settle(temporary)
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
    """Have a folder gone; whenever the process is killed, it is there whole or not at all."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    os.replace(folder, old)
    remove(old)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder that only this one writes now."""
    for pattern in (".*.tmp", ".*.old"):
        for left in folder.glob(pattern):
            remove(left)


def remove(path: Path) -> None:
    """Have a file or a folder gone, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Have all of it on disk, as readable as the umask says: safetensors makes private files."""
    if path.is_dir():
        for entry in path.iterdir():
            _settle(entry)
    else:
        path.chmod(0o666 & ~_UMASK)
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


def file_crc32(path: Path) -> int:
    """A checksum against damage, at the speed of a disk; it does not tell contents apart."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
