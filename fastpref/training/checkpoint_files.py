"""Checkpoints that are complete or absent, in safetensors and JSON; nothing is pickled.

A checkpoint holds the trained weights, the optimizer's state, the random state of each rank and the
position in the run. Frozen weights are loaded from their original source.

`torch.distributed.checkpoint` writes and reads the tensors. Each rank writes its own shards, and
any number of ranks can read them. Files are written from a copy while training continues. The
directory is renamed to `step-N` only after every file has been synced. Its `checksums.json`, which
is computed from the bytes as they are written, detects files that were damaged later.
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
_RUN_STATE, _CHECKSUMS = "state.json", "checksums.json"


class CheckpointError(UserError):
    """A checkpoint cannot be written or resumed from."""


class CheckpointWriter(HuggingFaceStorageWriter):
    """Writer of shards in safetensors and, on rank 0, of the run state and all checksums."""

    def __init__(self, folder: Path, run_state: dict[str, Any]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._run_state = folder, json.dumps(run_state).encode()
        self.fs = self._file_system = _ChecksumFileSystem()

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        checksums = self._file_system.checksums
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result([dataclasses.replace(r, storage_data=checksums) for r in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        checksums = {_RUN_STATE: zlib.crc32(self._run_state)}
        for result in chain.from_iterable(results):
            checksums |= result.storage_data
        (self._folder / _RUN_STATE).write_bytes(self._run_state)
        (self._folder / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))


class _ChecksumFileSystem(FileSystem):
    """Local file system that records the checksum of each file that it writes, by file name."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _ChecksumWriter(io.FileIO(path, mode)) as stream:
            yield stream
        self.checksums[Path(path).name] = stream.crc32


class _ChecksumWriter(io.BufferedWriter):
    """Buffered writer that computes the checksum of the written bytes."""

    crc32 = 0

    def write(self, data: Any, /) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


def find(root: Path, resume: str, note: Callable[[str], None]) -> Path | None:
    """Find the checkpoint to resume from, and verify its checksums.

    resume: a checkpoint folder, or "auto" for the newest undamaged checkpoint in `root`; None is
        returned if there is no checkpoint.
    note: called with a message about each damaged checkpoint that is skipped.

    A collective call: the ranks share the files to read. Raises CheckpointError if no checkpoint
    can be used.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / _RUN_STATE).is_file():
            raise CheckpointError(f"resume: {resume} is not a checkpoint folder; use one, or auto")
        problem = damage(folder)
        if problem is not None:
            raise CheckpointError(f"resume: {folder}: {problem}; use another checkpoint, or auto")
        return folder
    steps = complete_steps(root)
    for step in reversed(steps):
        folder = root / f"step-{step}"
        problem = damage(folder)
        if problem is None:
            return folder
        note(f"{folder} is skipped: {problem}")
    if steps:
        raise CheckpointError(
            f"resume: every checkpoint in {root} is damaged ({problem}); remove them to start over"
        )
    return None


def damage(folder: Path) -> str | None:
    """Message about a damaged or missing file of a checkpoint, or None; the same on all ranks."""
    names: list[str] = []
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_bytes())
        names = sorted(checksums)
        files_of_rank = range(distributed.rank(), len(names), distributed.world_size())
        damaged = [
            index
            for index in files_of_rank
            if not _has_checksum(folder / names[index], checksums[names[index]])
        ]
        last_damaged: float = max(damaged, default=-1)
    except (OSError, ValueError, TypeError):
        last_damaged = math.inf
    worst = distributed.all_reduce_max(last_damaged)
    if worst < 0:
        return None
    name = _CHECKSUMS if worst == math.inf else names[int(worst)]
    return f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"


def write_failure(error: BaseException) -> str:
    """First line of an error of writing; of the first rank that failed, if several did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _has_checksum(path: Path, expected: int) -> bool:
    try:
        return file_crc32(path) == expected
    # The file is missing or unreadable.
    except OSError:
        return False


def position(folder: Path) -> dict[str, Any]:
    """Saved position in the run, including its `step`."""
    run_state = read_run_state(folder)
    return {"step": run_state["step"], **run_state["position"]}


def read_run_state(folder: Path) -> dict[str, Any]:
    """Read step, position, optimizer name and shapes of the weights."""
    run_state: dict[str, Any] = json.loads((folder / _RUN_STATE).read_text())
    return run_state


def best_step(folder: Path) -> int | None:
    """Step of the best evaluation up to a checkpoint, or None; None too if it cannot be read."""
    try:
        step: int | None = read_run_state(folder)["position"]["best"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)
