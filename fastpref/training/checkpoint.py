"""Save and restore the state of a run with torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from fastpref import distributed
from fastpref.model.policy import Policy
from fastpref.training.checkpoint_files import (
    CheckpointError,
    CheckpointWriter,
    complete,
    read_about,
    write_failure,
)
from fastpref.utils.atomic_files import discard, remove, replace


class Checkpoints:
    """Those of a run, in `root/step-N`; the newest `keep` are kept."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._pending: tuple[Future[Any], Path] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        # Its collectives run beside those of training, so they need a group of their own.
        self._group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def save(
        self, step: int, policy: Policy, optimizer: Optimizer, position: dict[str, Any]
    ) -> None:
        """Begin to write `root/step-N`, when the one before is complete."""
        self.wait()
        temporary = self._root / f".step-{step}"
        if distributed.is_main_process():
            for stale in self._root.glob(".step-*"):  # left by a killed process
                remove(stale)
            temporary.mkdir(parents=True)
        distributed.barrier()
        about = {
            "step": step,
            "position": position,
            "optimizer": type(optimizer).__name__,
            "weights": {n: list(p.shape) for n, p in policy.trainable_parameters().items()},
        }
        future = dcp.async_save(
            {**_tensors(policy, optimizer), **_random_state()},
            storage_writer=CheckpointWriter(temporary, about),
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
            if distributed.is_main_process():
                shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full of it
            raise CheckpointError(f"cannot write {folder}: {write_failure(error)}") from None
        if distributed.is_main_process():
            replace(folder, temporary)
            self._drop(complete(self._root)[: -self._keep])

    def abandon_after(self, step: int) -> None:
        """Drop those of later steps, which a run that goes on from here does not lead to."""
        if distributed.is_main_process():
            self._drop([later for later in complete(self._root) if later > step])

    def close(self) -> None:
        self.wait()
        self._stager.close()

    def _drop(self, steps: list[int]) -> None:
        for step in steps:
            discard(self._root / f"step-{step}")


def restore(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Load weights, optimizer and random state, of as many ranks as there are now."""
    about = read_about(folder)
    shapes = {n: list(p.shape) for n, p in policy.trainable_parameters().items()}
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
    dcp.load(state, storage_reader=reader, no_dist=distributed.world_size() == 1)
    for name, value in random.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)


def _tensors(policy: Policy, optimizer: Optimizer) -> dict[str, Tensor]:
    """The very tensors of trained weights and optimizer, by their names in a checkpoint."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    weights = {f"weights.{name}": p.detach() for name, p in policy.trainable_parameters().items()}
    moments = {
        f"optimizer.{i}.{name}": t for i, entry in state.items() for name, t in entry.items()
    }
    return {**weights, **moments}


def _random_state() -> dict[str, Tensor]:
    state = {f"rng.{distributed.rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{distributed.rank()}.cuda"] = torch.cuda.get_rng_state()
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
