"""Checkpoints that are complete or absent, in safetensors and JSON; nothing is pickled.

A checkpoint holds the trained weights, the optimizer's state, the random state of each rank and the
position in the run. Frozen weights come from where they came from at the start.

`torch.distributed.checkpoint` writes and reads the tensors: each rank its own shards, and any
number of ranks what any other number has written. Writing goes on beside training, from a copy; the
folder has its name, and thereby is a checkpoint, when all of it is on disk.
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from fastpref import ranks
from fastpref.errors import UserError, first_line
from fastpref.files import replace
from fastpref.model import Policy

_NAME = re.compile(r"step-(\d+)")


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
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
            about = {
                "step": step,
                "position": position,
                "optimizer": type(optimizer).__name__,
                "weights": {n: list(p.shape) for n, p in policy.trained().items()},
            }
            (temporary / "state.json").write_text(json.dumps(about))
        ranks.wait()
        future = dcp.async_save(
            {**_tensors(policy, optimizer), **_random_state()},
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
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
            raise CheckpointError(f"cannot write {folder}: {first_line(error)}") from None
        if ranks.is_first():
            replace(folder, temporary)
            self._drop_oldest(int(folder.name.removeprefix("step-")))

    def close(self) -> None:
        self.wait()
        self._stager.close()

    def _drop_oldest(self, step: int) -> None:
        complete = _complete(self._root)
        kept = [done for done in complete if done <= step][-self._keep :]  # later: abandoned
        for old in set(complete) - set(kept):
            shutil.rmtree(self._root / f"step-{old}")


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint to continue from: the newest complete one for `auto`, or the folder named."""
    if resume != "auto":
        folder = Path(resume)
        if not (folder / "state.json").is_file():
            raise CheckpointError(f"resume: {resume} is not a checkpoint folder")
        return folder
    steps = _complete(root)
    return root / f"step-{steps[-1]}" if steps else None


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
    _make_moments(optimizer)
    # With more ranks than there were, some begin with a random state of their own.
    random = {name: value for name, value in _random_state().items() if name in stored}
    state = {**_tensors(policy, optimizer), **random}
    dcp.load(state, storage_reader=reader, no_dist=ranks.count() == 1)
    for name, value in random.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)


def _about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return about


def _complete(root: Path) -> list[int]:
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
