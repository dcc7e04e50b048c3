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
    best_step,
    complete_steps,
    read_run_state,
    write_failure,
)
from fastpref.utils.atomic_files import discard, remove, replace


class Checkpoints:
    """Checkpoints of a run in `root/step-N`, written in the background; the newest `keep` stay."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._pending: tuple[Future[Any], Path] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        # Its collectives run concurrently with those of training, which needs a separate group.
        self._group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: Optimizer,
        position: dict[str, Any],
        further: dict[str, Tensor] | None = None,
    ) -> None:
        """Wait for the previous checkpoint, then start to write `root/step-N`.

        further: other tensors that change during the run, such as the weights of a reference, by
            names that begin with those of their owner.
        """
        self.wait()
        temporary = self._root / f".step-{step}"
        if distributed.is_main_process():
            # A killed process may have left some.
            for stale in self._root.glob(".step-*"):
                remove(stale)
            temporary.mkdir(parents=True)
        distributed.barrier()
        run_state = {
            "step": step,
            "position": position,
            "optimizer": type(optimizer).__name__,
            "weights": {n: list(p.shape) for n, p in policy.trainable_parameters().items()},
        }
        future = dcp.async_save(
            {**_tensors(policy, optimizer, further), **_random_state()},
            storage_writer=CheckpointWriter(temporary, run_state),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        assert isinstance(future, Future)
        self._pending = future, temporary

    def poll(self) -> None:
        """Rename the pending checkpoint to its final name if all of it is written."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the pending checkpoint and rename it; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (future, temporary), self._pending = self._pending, None
        folder = temporary.with_name(temporary.name[1:])
        try:
            # On rank 0 this returns after all ranks have written their shards.
            future.result()
        except (Exception, CheckpointException) as error:
            if distributed.is_main_process():
                # Frees the space, since the disk may be full.
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot write {folder}: {write_failure(error)}") from None
        if distributed.is_main_process():
            replace(folder, temporary)
            self._delete(self._superseded())

    def delete_after(self, step: int) -> None:
        """Delete checkpoints of later steps, which a run that resumes from `step` replaces."""
        if distributed.is_main_process():
            self._delete([later for later in complete_steps(self._root) if later > step])

    def _superseded(self) -> list[int]:
        """Steps before the newest `keep`, but for those of the best evaluations that these name."""
        steps = complete_steps(self._root)
        best = {best_step(self._root / f"step-{step}") for step in steps[-self._keep :]}
        return [step for step in steps[: -self._keep] if step not in best]

    def close(self) -> None:
        self.wait()
        self._stager.close()

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            discard(self._root / f"step-{step}")


def restore(
    folder: Path,
    policy: Policy,
    optimizer: Optimizer,
    further: dict[str, Tensor] | None = None,
) -> None:
    """Load weights, optimizer and random state; the number of ranks may differ from the saved one.

    further: as in `Checkpoints.save`, loaded in place.

    Raises CheckpointError for a checkpoint of another model, adapter or optimizer.
    """
    _check_weights(folder, policy, "resume")
    saved_optimizer = read_run_state(folder)["optimizer"]
    if saved_optimizer != type(optimizer).__name__:
        raise CheckpointError(
            f"resume: {folder} is of a run with {saved_optimizer}; restore optim.name"
        )
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    # Before its first step an optimizer has no state.
    if any(name.startswith("optimizer.") for name in stored):
        _allocate_state(optimizer)
    # With more ranks than were saved, the additional ranks keep their own random state.
    random_state = {name: value for name, value in _random_state().items() if name in stored}
    state = {**_tensors(policy, optimizer, further), **random_state}
    dcp.load(state, storage_reader=reader, no_dist=distributed.world_size() == 1)
    for name, value in random_state.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)


def restore_weights(folder: Path, policy: Policy, field: str) -> None:
    """Load the trained weights alone; a collective call.

    field: how a message begins.

    Raises CheckpointError for a checkpoint of another model or adapter.
    """
    _check_weights(folder, policy, field)
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(_weights(policy), storage_reader=reader, no_dist=distributed.world_size() == 1)


def _check_weights(folder: Path, policy: Policy, field: str) -> None:
    shapes = {n: list(p.shape) for n, p in policy.trainable_parameters().items()}
    saved_shapes = read_run_state(folder)["weights"]
    if shapes != saved_shapes:
        names = {**shapes, **saved_shapes}
        mismatched = min(name for name in names if shapes.get(name) != saved_shapes.get(name))
        raise CheckpointError(
            f"{field}: {folder} is of another model or adapter (differs in {mismatched}); restore "
            "the model and adapter of the run"
        )


def _weights(policy: Policy) -> dict[str, Tensor]:
    """Trained weights, not copies, by their names in a checkpoint."""
    return {f"weights.{name}": p.detach() for name, p in policy.trainable_parameters().items()}


def _tensors(
    policy: Policy, optimizer: Optimizer, further: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Tensors of trained weights and optimizer and the others, not copies, by their names."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    moments = {
        f"optimizer.{i}.{name}": t for i, entry in state.items() for name, t in entry.items()
    }
    return {**_weights(policy), **moments, **(further or {})}


def _random_state() -> dict[str, Tensor]:
    """Random state of this rank's generators, by the names in a checkpoint."""
    state = {f"rng.{distributed.rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{distributed.rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


@torch.no_grad()
def _allocate_state(optimizer: Optimizer) -> None:
    """Create the optimizer's state by a step with zero gradients, which changes no weight."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
