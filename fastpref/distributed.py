"""The processes of a run: who am I, sums over all of us, and who goes first.

`torchrun` starts them and says so in the environment; one process alone needs nothing of it, and
every function here is then what it would be in a world of one. A collective must be called by all
ranks at the same point. Those of training come once per step or more seldom; what the sharded model
sends in between is FSDP's.
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

# What gloo, NCCL and the store say of a process that is no longer there.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exited",
)
TIMEOUT = timedelta(minutes=30)  # the longest that ranks wait, e.g. while the first one tokenises


class LostRank(UserError):
    """Another process of the run has ended before its time."""


@contextmanager
def process_group() -> Iterator[None]:
    """Within, the processes that torchrun started belong together; alone, nothing changes."""
    if _told("WORLD_SIZE", 1) == 1:
        yield
        return
    own, _, _ = map(_told, ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    # Tensors on CPU have a backend of their own: with it, ranks agree without a GPU waiting.
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    store: dist.Store | None = None
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device)
        store = dist.distributed_c10d._get_default_store()
        yield
    except (UserError, RuntimeError) as error:
        if any(words in str(error) for words in _LOST):
            raise LostRank(
                f"rank {own}: lost the connection to another rank; torchrun names the "
                "one that ended first"
            ) from None
        if store is None and isinstance(error, dist.DistError):
            meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {own}: cannot meet the others at {meeting}: {first_line(error)}; "
                "give torchrun another --master-addr or --master-port"
            ) from None
        if store is not None and isinstance(error, UserError):
            error.is_news = _says_first(store, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _says_first(store: dist.Store, error: UserError) -> bool:
    """Whether no other rank has said the same; true where nobody can tell any more."""
    text = f"rank {rank()} says: {error}"
    try:
        said: bytes = store.compare_set(str(error), "", text)
    except RuntimeError:  # the process that held the store is gone
        return True
    return said.decode() == text


def _told(name: str, default: int | None = None) -> int:
    """A number that torchrun says in the environment."""
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
    """Number of this rank on its machine, from 0."""
    return _told("LOCAL_RANK", 0)


def is_main_process() -> bool:
    return rank() == 0


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place; returns it. The same bits on each."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_sum_coalesced_(tensors: Iterable[Tensor]) -> None:
    """`all_reduce_sum_` of many tensors of one dtype, in place and in a single collective."""
    parts = list(tensors)
    if world_size() == 1 or not parts:
        return
    flat = all_reduce_sum_(torch.cat([part.flatten() for part in parts]))
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


def all_reduce_max(value: float) -> float:
    """The largest of all ranks' values."""
    if world_size() == 1:
        return value
    dist.all_reduce(found := torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX)
    return found.item()


def all_ranks(value: bool) -> bool:
    """Whether it is so on every rank."""
    return all_reduce_max(float(not value)) == 0.0


def all_equal(value: float) -> bool:
    """Whether all ranks have the same value."""
    return all_reduce_max(value) == -all_reduce_max(-value)


def gather(values: Tensor) -> Tensor:
    """The values (N,) of all ranks, in the order of the ranks; N may differ."""
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
    """Until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first rank of each machine does what is within, then the others.

    What it leaves on disk, they find. An error is raised on all ranks that run into it.
    """
    if local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()
