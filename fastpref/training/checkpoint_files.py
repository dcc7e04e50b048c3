"""Checkpoints that are complete or absent, in safetensors and JSON; nothing is pickled.

A checkpoint holds the trained weights, the optimizer's state, the random state of each rank and the
position in the run. Frozen weights come from where they came from at the start.

`torch.distributed.checkpoint` writes and reads the tensors: each rank its own shards, and any
number of ranks what any other number has written. Writing goes on beside training, from a copy; the
folder has its name, and thereby is a checkpoint, when all of it is on disk. Its `checksums.json`,
taken of the bytes as they went out, tells a file that was harmed later.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from fastpref import distributed
from fastpref.utils.atomic_files import file_crc32
from fastpref.utils.errors import UserError, first_line

_NAME = re.compile(r"step-(\d+)")


_ABOUT, _CHECKSUMS = "state.json", "checksums.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


class CheckpointWriter(HuggingFaceStorageWriter):
    """Shards as safetensors; then, on the first rank, what the run knows, and all checksums."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._about = folder, json.dumps(about).encode()
        self.fs = self._summing = _Summing()

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        written = super().write_data(plan, planner).value()
        sums = self._summing.sums
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result([dataclasses.replace(each, storage_data=sums) for each in written])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        sums = {_ABOUT: zlib.crc32(self._about)}
        for each in chain.from_iterable(results):
            sums |= each.storage_data
        (self._folder / _ABOUT).write_bytes(self._about)
        (self._folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1))


class _Summing(FileSystem):
    """The local disk; keeps the checksum of each file that it has written, by its name."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _Summed(io.FileIO(path, mode)) as stream:
            yield stream
        self.sums[Path(path).name] = stream.crc32


class _Summed(io.BufferedWriter):
    """A file, and the checksum of what went into it."""

    crc32 = 0

    def write(self, data: Any, /) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


def find(root: Path, resume: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from, every byte of it as it was written.

    For `auto` the newest of those, None where there is no checkpoint; those passed over are noted.
    Otherwise the folder named. All ranks call this, and each file is read by one of them.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / _ABOUT).is_file():
            raise CheckpointError(f"resume: {resume} is not a checkpoint folder; name one, or auto")
        damage = _damage(folder)
        if damage is not None:
            raise CheckpointError(f"resume: {folder}: {damage}; name another checkpoint, or auto")
        return folder
    steps = complete(root)
    for step in reversed(steps):
        folder = root / f"step-{step}"
        damage = _damage(folder)
        if damage is None:
            return folder
        note(f"{folder} is passed over: {damage}")
    if steps:
        raise CheckpointError(
            f"resume: no checkpoint in {root} is whole ({damage}); remove them to start anew"
        )
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is. The same on all ranks."""
    names: list[str] = []
    try:
        sums = json.loads((folder / _CHECKSUMS).read_bytes())
        names = sorted(sums)
        own = range(distributed.rank(), len(names), distributed.world_size())
        harmed = [k for k in own if not _has_sum(folder / names[k], sums[names[k]])]
        found: float = max(harmed, default=-1)
    except (OSError, ValueError, TypeError):
        found = math.inf
    worst = distributed.all_reduce_max(found)
    if worst < 0:
        return None
    name = _CHECKSUMS if worst == math.inf else names[int(worst)]
    return f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"


def write_failure(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # of the first rank that has one
    return first_line(error)


def _has_sum(path: Path, expected: int) -> bool:
    try:
        return file_crc32(path) == expected
    except OSError:  # it is not there, or the disk cannot read it
        return False


def position(folder: Path) -> dict[str, Any]:
    """The saved position in the run, with its `step`."""
    about = read_about(folder)
    return {"step": about["step"], **about["position"]}


def read_about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
    return about


def complete(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    found = [_NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for match in found if match)
