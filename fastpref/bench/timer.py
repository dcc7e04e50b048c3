"""Seconds of callables that take turns, and what one of them allocates on a GPU."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastpref.bench.contestants import reason

Run = Callable[[], Any]
Clock = Callable[[Run], tuple[float, Any]]  # seconds and result of one call

MIN_ROUNDS = 5
TOO_SLOW = 10  # times the yardstick, and longer than
PATIENCE = 1.0  # seconds: the warm-up is all there is
WARM_UPS = {"cpu": 1, "cuda": 2}  # kernels are compiled in the first


def clock(device: str) -> Clock:
    """The one clock of a device: wall time on a CPU, events around the call on a GPU."""
    return _cuda_clock() if device == "cuda" else _wall_clock


def interleave(
    runs: dict[str, Run],
    device: str,
    rounds: int,
    yardstick: str,
    inspect: Callable[[str, Any], None] = lambda name, result: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run's counted calls by name, and by name why others have none.

    A warm-up of each comes first, whose result `inspect` sees; then `rounds` times one call of
    each, so that whatever slows the machine for a while slows all of them, and in another order
    each time: what runs after a long product finds a hot GPU with a lower clock.
    """
    tick = clock(device)
    first: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM_UPS[device]):
                seconds, result = tick(run)
            inspect(name, result)
            first[name] = seconds
        except Exception as error:
            failures[name] = reason(error)
        if name in failures:  # only now does the error, with all that its frames hold, let go
            release(device)
    limit = max(PATIENCE, TOO_SLOW * first.get(yardstick, float("inf")))
    times: dict[str, list[float]] = {name: [] for name in first if first[name] <= limit}
    order, shuffle = list(times), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(tick(runs[name])[0])
    return {name: times.get(name, [first[name]]) for name in first}, failures


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


def cuda_extra_bytes(run: Run, outputs: Callable[[Any], int]) -> int:
    """Most that a run has allocated at a time, beyond what was there and its `outputs` bytes."""
    release("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs(result)


def release(device: str) -> None:
    """Give a GPU's memory back that nothing refers to any more."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _wall_clock(run: Run) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _cuda_clock() -> Clock:
    # Written before each call, so that no call finds its inputs in the L2 cache.
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def tick(run: Run) -> tuple[float, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, result

    return tick
