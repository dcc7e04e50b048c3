"""Ranks of a run: process group, rank numbers, collectives and barriers.

`torchrun` starts the ranks and sets their environment, or `srun` does (see `utils.slurm`). In a
single process without them, every function behaves as with a world size of 1. All ranks must call a
collective at the same point. Training calls these collectives at most once per step; the
communication of a sharded model within a step is FSDP's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.utils import slurm
from fastpref.utils.errors import UserError, first_line, of_file

# Messages of gloo, NCCL and the store about a process that has ended.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exited",
)
# Longest wait for another rank, e.g. while the first one tokenizes.
TIMEOUT = timedelta(minutes=30)
# The same while the first one works for all of them, e.g. asks a judge or servers.
_LONG_TIMEOUT = timedelta(days=365)
# Seconds for the name of the first rank's machine, which may be published a moment later.
_LOOK_UP = 8.0
T = TypeVar("T")


class LostRank(UserError):
    """Another rank of the run has ended unexpectedly."""


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize the process group when launched by torchrun or srun; no-op for one process."""
    if started_ranks() == 1:
        yield
        return
    this_rank, _, _ = map(_environment_int, ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    _check_address(this_rank)
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of_rank())
        torch.cuda.set_device(device)
    store: dist.Store | None = None
    try:
        store = _meet(device)
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
            _patient_group.cache_clear()
            dist.destroy_process_group()


def _check_address(this_rank: int) -> None:
    """Raise UserError if the machine of rank 0 is not named or has no address."""
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise UserError(
            "MASTER_ADDR: must name the machine of rank 0 in the environment of several ranks, got "
            "none; start them with torchrun or srun, or unset WORLD_SIZE"
        )
    reasons: list[str] = []

    def look_up() -> None:
        deadline = time.monotonic() + _LOOK_UP
        while True:
            try:
                socket.getaddrinfo(host, None)
                reasons.clear()
                return
            except (OSError, UnicodeError) as error:
                reasons[:] = [first_line(error)]
            if time.monotonic() + 1 > deadline:
                return
            time.sleep(1)

    # A name server that does not answer holds the call for longer.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LOOK_UP)
    if thread.is_alive() or reasons:
        reason = reasons[0] if reasons else "the name server does not answer"
        raise UserError(
            f"MASTER_ADDR: rank {this_rank} finds no address of {host}: {reason}; use a name or "
            "address of the machine of rank 0 that this machine knows"
        )


def _meet(device: torch.device | None) -> dist.Store:
    """Initialize the process group, and return its store."""
    # CPU tensors use gloo, so that their collectives do not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    store, number, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    store.set_timeout(TIMEOUT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(_attempt(store, number, count), store)
    dist.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=TIMEOUT, device_id=device
    )
    return store


def _attempt(store: dist.Store, number: int, count: int) -> str:
    """Agree on a name for this start of the ranks, which no earlier start has had.

    The store of torchrun outlives the ranks that it restarts, and has the addresses of the last
    ones. Its TORCHELASTIC_RESTART_COUNT is no common name, since each node counts its own restarts.
    So rank 0 makes a name up, and answers the other ranks, each of which asks under a new key.
    """
    name = uuid.uuid4().hex
    if number > 0:
        store.set(f"fastpref/asks/{number}", name)
        name = store.get(f"fastpref/answer/{name}").decode()
        store.set(f"fastpref/here/{name}/{number}", "")
        return name
    absent = set(range(1, count))
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while absent:
        for other in sorted(absent):
            asks = f"fastpref/asks/{other}"
            if store.check([f"fastpref/here/{name}/{other}"]):
                absent.discard(other)
            elif store.check([asks]):
                # The question may be one of an earlier start, which nobody waits for.
                store.set(f"fastpref/answer/{store.get(asks).decode()}", name)
        if time.monotonic() > deadline:
            raise dist.DistError(f"{len(absent)} of {count} ranks did not come")
        if absent:
            time.sleep(0.02)
    return name


def gpu_of_rank() -> int:
    """Number of the GPU of this rank; raises UserError if there are fewer GPUs than ranks."""
    gpus, local = torch.cuda.device_count(), local_rank()
    # SLURM may show each task its own GPU alone, as may a scheduler of containers.
    if gpus == 1 and local_world_size() > 1 and "SLURM_LOCALID" in os.environ:
        return 0
    if local >= gpus:
        raise UserError(
            f"rank {_environment_int('RANK', 0)}: number {local} of the ranks of this machine, "
            f"which shows {gpus} GPUs; start as many ranks as GPUs"
        )
    return local


def _reports_first(store: dist.Store, error: UserError) -> bool:
    """Whether this rank is the first to report an error; True if the store is gone."""
    text = f"rank {rank()} says: {error}"
    try:
        stored: bytes = store.compare_set(str(error), "", text)
    except RuntimeError:  # the process that serves the store has ended
        return True
    return stored.decode() == text


def started_ranks() -> int:
    """Number of ranks that torchrun or srun has started, known before they meet."""
    slurm.adopt(os.environ)
    return _environment_int("WORLD_SIZE", 1)


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


def broadcast(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The value of rank 0, of what JSON knows, on all ranks."""
    if world_size() == 1:
        return value
    text = _encoded(value) if is_main_process() else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor(len(text))
    dist.broadcast(size, 0, group)
    if not is_main_process():
        text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0, group)
    return _decoded(text)


def on_main_process(compute: Callable[[], T]) -> T:
    """Compute a value on rank 0 alone, and return it, of what JSON knows, on all ranks.

    The others wait as long as it takes. Where rank 0 raises UserError or OSError, all ranks raise
    UserError with its message.
    """
    if world_size() == 1:
        return compute()
    value: T | None = None
    error: UserError | None = None
    if is_main_process():
        try:
            value = compute()
        except UserError as raised:
            error = raised
        except OSError as raised:
            error = UserError(of_file(raised))
    value, message = broadcast((value, error and str(error)), _patient_group())
    if message is not None:
        raise error or UserError(message)
    return value  # type: ignore[return-value]


@cache
def _patient_group() -> dist.ProcessGroup:
    """All ranks, for collectives in which they may wait longer than `TIMEOUT`."""
    return dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, of what JSON knows, in rank order."""
    if world_size() == 1:
        return [value]
    text = _encoded(value)
    sizes = gather(torch.tensor([len(text)])).tolist()
    return [_decoded(part) for part in gather(text).split(sizes)]


def _encoded(value: object) -> Tensor:
    """JSON of a value as bytes (N,) on the CPU: a pickle could run code."""
    return torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())


def _decoded(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


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
