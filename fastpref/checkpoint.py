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
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from fastpref import ranks
from fastpref.errors import UserError, first_line
from fastpref.files import discard, file_crc32, remove, replace
from fastpref.model import Policy

_NAME = re.compile(r"step-(\d+)")
_ABOUT, _CHECKSUMS = "state.json", "checksums.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


class Checkpoints:
    """Those of a run, in `root/step-N`; the newest `keep` are kept."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._pending: tuple[Future[Any], Path] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        # Its collectives run beside those of training, so they need a group of their own.
        self._group = dist.new_group(backend="gloo") if ranks.count() > 1 else None

    def save(
        self, step: int, policy: Policy, optimizer: Optimizer, position: dict[str, Any]
    ) -> None:
        """Begin to write `root/step-N`, when the one before is complete."""
        self.wait()
        temporary = self._root / f".step-{step}"
        if ranks.is_first():
            for stale in self._root.glob(".step-*"):  # left by a killed process
                remove(stale)
            temporary.mkdir(parents=True)
        ranks.wait()
        about = {
            "step": step,
            "position": position,
            "optimizer": type(optimizer).__name__,
            "weights": {n: list(p.shape) for n, p in policy.trained().items()},
        }
        future = dcp.async_save(
            {**_tensors(policy, optimizer), **_random_state()},
            storage_writer=_Writer(temporary, about),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        assert isinstance(future, Future)
        self._pending = future, temporary

    def poll(self) -> None:
        """Make the checkpoint that is being written visible if it is complete."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete; raises what went wrong."""
        if self._pending is None:
            return
        (future, temporary), self._pending = self._pending, None
        folder = temporary.with_name(temporary.name[1:])
        try:
            future.result()  # on the first rank: all ranks have written theirs
        except (Exception, CheckpointException) as error:
            if ranks.is_first():
                shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full of it
            raise CheckpointError(f"cannot write {folder}: {_reason(error)}") from None
        if ranks.is_first():
            replace(folder, temporary)
            self._drop(complete(self._root)[: -self._keep])

    def abandon_after(self, step: int) -> None:
        """Drop those of later steps, which a run that goes on from here does not lead to."""
        if ranks.is_first():
            self._drop([later for later in complete(self._root) if later > step])

    def close(self) -> None:
        self.wait()
        self._stager.close()

    def _drop(self, steps: list[int]) -> None:
        for step in steps:
            discard(self._root / f"step-{step}")


class _Writer(HuggingFaceStorageWriter):
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
        own = range(ranks.rank(), len(names), ranks.count())
        harmed = [k for k in own if not _has_sum(folder / names[k], sums[names[k]])]
        found: float = max(harmed, default=-1)
    except (OSError, ValueError, TypeError):
        found = math.inf
    worst = ranks.largest(found)
    if worst < 0:
        return None
    name = _CHECKSUMS if worst == math.inf else names[int(worst)]
    return f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"


def _reason(error: BaseException) -> str:
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
    about = _about(folder)
    return {"step": about["step"], **about["position"]}


def restore(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Load weights, optimizer and random state, of as many ranks as there are now."""
    about = _about(folder)
    shapes = {n: list(p.shape) for n, p in policy.trained().items()}
    if shapes != about["weights"]:
        saved = about["weights"]
        odd = min(name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name))
        raise CheckpointError(f"resume: {folder} is of another model or adapter (differs in {odd})")
    if about["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"resume: {folder} is of a run with {about['optimizer']}; restore optim.name"
        )
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    if any(name.startswith("optimizer.") for name in stored):  # else it has taken no step yet
        _make_moments(optimizer)
    # With more ranks than there were, some begin with a random state of their own.
    random = {name: value for name, value in _random_state().items() if name in stored}
    state = {**_tensors(policy, optimizer), **random}
    dcp.load(state, storage_reader=reader, no_dist=ranks.count() == 1)
    for name, value in random.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)


def _about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
    return about


def complete(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    found = [_NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _tensors(policy: Policy, optimizer: Optimizer) -> dict[str, Tensor]:
    """The very tensors of trained weights and optimizer, by their names in a checkpoint."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    weights = {f"weights.{name}": p.detach() for name, p in policy.trained().items()}
    moments = {
        f"optimizer.{i}.{name}": t for i, entry in state.items() for name, t in entry.items()
    }
    return {**weights, **moments}


def _random_state() -> dict[str, Tensor]:
    state = {f"rng.{ranks.rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{ranks.rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


@torch.no_grad()
def _make_moments(optimizer: Optimizer) -> None:
    """Have the optimizer make its state, by a step that changes no weight."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
