"""Time of each part of an op and of each tile shape of configs.py; a section of gpu/suite.py.

Every row is timed by the timer of `fastpref bench`. Promote a candidate by moving it to the front
of its table in kernels/fastpref_kernels/common/configs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.gpu import elementwise
from fastpref.bench import contestants, problems, timer
from fastpref.bench.problems import Inputs, Problem

Check = tuple[dict[str, Any], Callable[[], dict[str, Any]]]

MIB = 2**20
SHAPE, DRY_SHAPE = problems.CUDA_SHAPES[0], (16, 32, 96)
OTHER_SHAPES = problems.CUDA_SHAPES[2:]
MOST_MIB = 560
MODULE = "fastpref_kernels.linear_logps"
T = TypeVar("T")


def ablation(device: str, dry: bool) -> Iterator[Check]:
    """Elementwise kernels; kernels of an op, tile shapes and rows a chunk, next to cuBLAS GEMMs."""
    yield from elementwise.timings(device, dry)
    dtype = "float32" if dry else problems.DTYPE[device]
    shapes = (DRY_SHAPE,) if dry else (SHAPE, *OTHER_SHAPES)
    frozen, trained, forward, kl = (
        Problem(op, head, *shapes[0], dtype)
        for op, head in (
            ("linear_logps", "frozen"),
            ("linear_logps", "trained"),
            ("forward", "frozen"),
            ("linear_kl", "frozen"),
        )
    )
    for problem in (frozen, trained, kl):
        part = {"part": f"{problem.op}, {problem.head}: kernels, ms"}
        yield part, partial(_profile, problem, device)
    for problem, table in ((forward, "gemm"), (frozen, "gemm"), (trained, "gemm"), (kl, "pair")):
        part = {"part": f"{problem.op}, {problem.head}: tiles"}
        yield part, partial(_tiles, problem, table, device)
    yield {"part": "the first GEMM of one chunk"}, partial(_first_gemm, frozen, device)
    for shape in shapes:
        problem = Problem("linear_logps", "frozen", *shape, dtype)
        part = {"part": f"linear_logps, frozen, T {shape[0]}, D {shape[1]}, V {shape[2]}: rows"}
        yield part, partial(_chunks, problem, device)


def _profile(problem: Problem, device: str) -> dict[str, Any]:
    """Milliseconds of each kernel of one call, and of all from the first to the last."""
    run = _ours(problem, problems.make_inputs(problem, device))
    for _ in range(3):
        run()
    with torch.profiler.profile() as profiler:
        run()
        timer.release(device)
    milliseconds: dict[str, float] = {}
    spans = [e.time_range for e in profiler.events() if e.device_type.name == "CUDA"]
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            elapsed = event.time_range.elapsed_us() / 1000
            milliseconds[event.name] = milliseconds.get(event.name, 0.0) + elapsed
    if spans:
        first, last = min(s.start for s in spans), max(s.end for s in spans)
        milliseconds["from first to last"] = (last - first) / 1e3
    return {"kernels": dict(sorted(milliseconds.items(), key=lambda item: -item[1])[:16])}


def _tiles(problem: Problem, table: str, device: str) -> dict[str, Any]:
    """Every tile shape of a table."""
    inputs = problems.make_inputs(problem, device)
    ours = _ours(problem, inputs)
    runs: dict[str, timer.Run] = {
        config: partial(with_candidate, table, index, problem.dtype, device, ours)
        for index, config in candidates(table, problem.dtype, device)
    }
    return _with_gemms(problem, inputs, runs, device)


def _chunks(problem: Problem, device: str) -> dict[str, Any]:
    """Numbers of rows in a chunk of dlogits, up to MOST_MIB."""
    most = MOST_MIB * MIB // (problem.V * getattr(torch, problem.dtype).itemsize)
    inputs = problems.make_inputs(problem, device)
    ours = _ours(problem, inputs)

    def run(count: int) -> torch.Tensor:
        # A chunk holds whole rows of the vocabulary, in multiples of 128 rows.
        budget = count * problem.V * inputs.weight.element_size()
        with contestants.setting(MODULE, "CHUNK_BYTES", budget):
            return ours()

    counts = range(512, min(most, problem.T) + 1, 128) if device == "cuda" else (16,)
    runs: dict[str, timer.Run] = {f"{count} rows": partial(run, count) for count in counts}
    return _with_gemms(problem, inputs, runs, device)


def _first_gemm(problem: Problem, device: str) -> dict[str, Any]:
    """hidden @ weight.T for the rows of one chunk, alone and inside the kernels that use it."""
    from fastpref.ops.backend import Head
    from fastpref_kernels.common.launch import aligned_rows
    from fastpref_kernels.dlogits import label_logits, softmax_dlogits
    from fastpref_kernels.linear_logps import rows_per_chunk
    from fastpref_kernels.softmax_stats import linear_softmax_fwd

    inputs = problems.make_inputs(problem, device)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    hidden = hidden[: rows_per_chunk(problem.V, weight.element_size())]
    labels = inputs.labels[: len(hidden)]
    out = aligned_rows(len(hidden), problem.V, weight)
    row_scale = hidden.new_empty(len(hidden), dtype=torch.float32)
    head = Head(weight)
    runs: dict[str, timer.Run] = {
        "gemm": lambda: torch.mm(hidden, weight.T, out=out),
        "the other GEMM": lambda: torch.mm(out, weight),
        "statistics": lambda: linear_softmax_fwd(hidden, head, labels, full=False),
        "statistics and dlogits": lambda: softmax_dlogits(hidden, head, labels, out, row_scale),
        "logits of the labels": lambda: label_logits(hidden, head, labels),
    }
    flops = 2 * len(hidden) * problem.D * problem.V
    return _timed(runs, flops, device)


def _with_gemms(
    problem: Problem, inputs: Inputs, runs: dict[str, timer.Run], device: str
) -> dict[str, Any]:
    gemm = contestants.gemm_baseline(problem, inputs, problem.gemms)
    return _timed({"gemm": gemm, **runs}, problem.flops, device)


def _timed(runs: dict[str, timer.Run], flops: float, device: str) -> dict[str, Any]:
    """Seconds and speed of interleaved runs."""
    times, failures = timer.interleave(runs, device, timer.MIN_ROUNDS, "gemm")
    summaries = {name: timer.summary(seconds) for name, seconds in times.items()}
    speeds = {name: flops / seconds["median"] / 1e12 for name, seconds in summaries.items()}
    row = {"seconds": summaries, "tflops": speeds}
    return row | {"broken": failures} if failures else row


def _ours(problem: Problem, inputs: Inputs) -> timer.Run:
    for implementation in contestants.implementations(inputs.hidden.device.type, ()):
        if implementation.name == "fastpref triton":
            return contestants.prepare(implementation, problem, inputs)
    raise RuntimeError("impl='triton' is not available on this device")


def _tables(name: str, dtype: str) -> dict[int, Any]:
    from fastpref_kernels.common import configs

    if dtype == "float32":
        return configs.FLOAT_GEMM
    return configs.HALF_GEMM if name == "gemm" else configs.HALF_PAIR


def candidates(name: str, dtype: str, device: str) -> list[tuple[int, str]]:
    """Indices and names of this device's tile shapes; the interpreter has one."""
    if device != "cuda":
        return [(0, "interpreter")]
    from fastpref_kernels.common.configs import table_arch

    table = _tables(name, dtype)[table_arch(torch.cuda.get_device_capability())]
    return [(i, "x".join(str(int(x)) for x in config)) for i, config in enumerate(table)]


def with_candidate(name: str, index: int, dtype: str, device: str, run: Callable[[], T]) -> T:
    """Result of `run` with one candidate in use."""
    if device != "cuda":
        return run()
    with _first(name, index, dtype):
        return run()


@contextmanager
def _first(name: str, index: int, dtype: str) -> Iterator[None]:
    """Context manager that moves one candidate to the front of its table, where it is used."""
    from fastpref_kernels.common.configs import table_arch

    table = _tables(name, dtype)
    arch = table_arch(torch.cuda.get_device_capability())
    configs = table[arch]
    table[arch] = (configs[index], *configs[:index], *configs[index + 1 :])
    try:
        yield
    finally:
        table[arch] = configs
