"""Ranks of a run: process group, rank numbers, collectives and barriers.

`torchrun` starts the ranks and sets their environment. In a single process without it, every
function behaves as with a world size of 1. All ranks must call a collective at the same point.
Training calls these collectives at most once per step; the communication of a sharded model within
a step is FSDP's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.utils.errors import UserError, first_line

# Messages of gloo, NCCL and the store about a process that has ended.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exited",
)
# Longest wait for another rank, e.g. while the first one tokenizes.
TIMEOUT = timedelta(minutes=30)


class LostRank(UserError):
    """Another rank of the run has ended unexpectedly."""


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize the process group when launched by torchrun; no-op for one process."""
    if _environment_int("WORLD_SIZE", 1) == 1:
        yield
        return
    this_rank, _, _ = map(_environment_int, ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    # CPU tensors use gloo, so that their collectives do not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    store: dist.Store | None = None
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device)
        store = dist.distributed_c10d._get_default_store()
        yield
    except (UserError, RuntimeError) as error:
        if any(words in str(error) for words in _LOST):
            raise LostRank(
                f"rank {this_rank}: lost the connection to another rank; torchrun names the "
                "one that ended first"
            ) from None
        if store is None and isinstance(error, dist.DistError):
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {this_rank}: cannot connect to the other ranks at {address}: "
                f"{first_line(error)}; use another --master-addr or --master-port of torchrun"
            ) from None
        if store is not None and isinstance(error, UserError):
            error.should_print = _reports_first(store, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _reports_first(store: dist.Store, error: UserError) -> bool:
    """Whether this rank is the first to report an error; True if the store is gone."""
    text = f"rank {rank()} says: {error}"
    try:
        stored: bytes = store.compare_set(str(error), "", text)
    except RuntimeError:  # the process that serves the store has ended
        return True
    return stored.decode() == text


def _environment_int(name: str, default: int | None = None) -> int:
    """Integer from the environment of torchrun."""
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: must be a whole number in the environment of several ranks, got {value!r}; "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this rank on its node, from 0."""
    return _environment_int("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of ranks on this node."""
    return _environment_int("LOCAL_WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place and return it, bit-identical on all ranks."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_sum_coalesced_(tensors: Iterable[Tensor]) -> None:
    """Apply `all_reduce_sum_` to many tensors of one dtype in a single collective."""
    parts = list(tensors)
    if world_size() == 1 or not parts:
        return
    flat = all_reduce_sum_(torch.cat([part.flatten() for part in parts]))
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


def all_reduce_max(value: float) -> float:
    """Maximum of the values of all ranks."""
    if world_size() == 1:
        return value
    maximum = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return maximum.item()


def all_ranks(value: bool) -> bool:
    """Whether `value` is True on all ranks."""
    return all_reduce_max(float(not value)) == 0.0


def all_equal(value: float) -> bool:
    """Whether all ranks have the same value."""
    return all_reduce_max(value) == -all_reduce_max(-value)


def gather(values: Tensor) -> Tensor:
    """Concatenate the values (N,) of all ranks in rank order; N may differ between ranks."""
    if world_size() == 1:
        return values
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=values.device)
    sizes[rank()] = len(values)
    all_reduce_sum_(sizes)
    padded = values.new_zeros(int(sizes.max()))
    padded[: len(values)] = values
    rows = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(rows, padded)
    return torch.cat([row[:size] for row, size in zip(rows, sizes.tolist(), strict=True)])


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on local rank 0 first, then on the other ranks of the node.

    The other ranks can read the files that it writes. Each rank raises its own errors.
    """
    if local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()
