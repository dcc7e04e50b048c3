"""Seconds of callables that take turns, and memory that a callable allocates on a GPU."""

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
# A run longer than both limits is timed once, in its warm-up.
TOO_SLOW = 10  # times the GEMM baseline
PATIENCE = 1.0  # seconds
WARM_UPS = {"cpu": 1, "cuda": 2}  # the first one compiles the kernels


def clock(device: str) -> Clock:
    """The clock of a device: wall time on a CPU, events around the call on a GPU."""
    return _cuda_clock() if device == "cuda" else _wall_clock


def interleave(
    runs: dict[str, Run],
    device: str,
    rounds: int,
    baseline: str,
    inspect: Callable[[str, Any], None] = lambda name, result: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time runs in turns: seconds of each run's calls, and the reason for each run that failed.

    baseline: the run that `TOO_SLOW` refers to.

    Each run has a warm-up first, whose result is passed to `inspect`. Then each round calls every
    run once, so that anything that slows the machine for a while slows all of them. Every round has
    another order: a run that follows a long GEMM finds a hot GPU with a lower clock.
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
        # Outside the except block: the error's frames hold tensors until the block ends.
        if name in failures:
            release(device)
    limit = max(PATIENCE, TOO_SLOW * first.get(baseline, float("inf")))
    times: dict[str, list[float]] = {name: [] for name in first if first[name] <= limit}
    order, shuffle = list(times), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(tick(runs[name])[0])
    return {name: times.get(name, [first[name]]) for name in first}, failures


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


def cuda_extra_bytes(run: Run, outputs: Callable[[Any], int]) -> int:
    """Peak bytes that a run allocates, without its `outputs` bytes."""
    release("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs(result)


def release(device: str) -> None:
    """Free GPU memory that nothing refers to."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _wall_clock(run: Run) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _cuda_clock() -> Clock:
    # Writing this before each call keeps the inputs out of the L2 cache.
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
