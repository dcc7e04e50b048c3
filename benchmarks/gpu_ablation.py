"""What the parts of an op cost, and each tile shape of configs.py; a section of gpu_suite.py.

Every row is timed by the one timer of `fastpref bench`. Promote a candidate by moving it to the
front of its table in kernels/fastpref_kernels/configs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastpref import ops
from fastpref.bench import peers, rows, timer
from fastpref.bench.rows import Inputs, Problem

Check = tuple[dict[str, Any], Callable[[], dict[str, Any]]]

MIB = 2**20
SHAPE, DRY_SHAPE = (8192, 4096, 128256), (16, 32, 96)
CHUNK_MIB = (64, 128, 256, 512)
ACTIVE_SHARES = (1.0, 0.5, 0.1)  # of blocks of delta
MODULE = "fastpref_kernels.linear_logps"


def ablation(device: str, dry: bool) -> Iterator[Check]:
    """Chunk sizes, tile shapes, and cuBLAS alone at the shapes that an op calls it with."""
    dtype = "float32" if dry else rows.DTYPE[device]
    frozen, trained, forward, kl = (
        Problem(op, head, *(DRY_SHAPE if dry else SHAPE), dtype)
        for op, head in (
            ("linear_logps", "frozen"),
            ("linear_logps", "trained"),
            ("forward", "frozen"),
            ("linear_kl", "frozen"),
        )
    )
    for mib in CHUNK_MIB:
        part = {"part": "cuBLAS: delta @ weight of one chunk", "chunk_mib": mib}
        yield part, partial(_one_chunk, frozen, mib, device)
    for name in ("cuBLAS: logits", "logits and their exponentials", "the same, turned into delta"):
        yield {"part": f"{name} of one chunk"}, partial(_first_product, name, frozen, device)
    for share in ACTIVE_SHARES:
        part = {"part": "Triton: delta @ weight of one chunk", "active_share": share}
        yield part, partial(_walked_chunk, frozen, share, device)
    for problem, table in ((forward, "gemm"), (frozen, "gemm"), (trained, "gemm"), (kl, "pair")):
        for index, config in candidates(table, dtype, device):
            part = {"part": f"{problem.op}, {problem.head}: tiles", "config": config}
            run = partial(_op, problem, device)
            yield part, partial(with_candidate, table, index, dtype, device, run)
    for index, config in candidates("gemm", dtype, device):
        run = partial(_delta_panel, frozen, device)
        part = {"part": "delta of one panel, made again", "config": config}
        yield part, partial(with_candidate, "gemm", index, dtype, device, run)
    for mib in CHUNK_MIB:
        part = {"part": "linear_logps, frozen: chunk", "chunk_mib": mib}
        yield part, partial(_with_chunk, mib, frozen, device)


def _one_chunk(problem: Problem, mib: int, device: str) -> dict[str, Any]:
    inputs = rows.make_inputs(problem, device)
    weight = inputs.weight.detach()
    count = min(problem.T, max(1, mib * MIB // (problem.V * weight.element_size())))
    delta = weight.new_empty(count, problem.V).normal_(std=problem.V**-0.5)
    found = _timed(lambda: torch.mm(delta, weight), device)
    return found | _rate(2 * count * problem.D * problem.V, found) | {"rows": count}


def _first_product(name: str, problem: Problem, device: str) -> dict[str, Any]:
    """hidden @ weight.T of as many rows as the op takes at a time, and what is made of it."""
    from fastpref_kernels.delta import softmax_delta
    from fastpref_kernels.forward import linear_softmax_fwd
    from fastpref_kernels.launch import aligned_rows, gemm_config
    from fastpref_kernels.linear_logps import rows_per_chunk

    inputs = rows.make_inputs(problem, device)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    hidden = hidden[: rows_per_chunk(problem.V, weight.element_size())]
    labels = inputs.labels[: len(hidden)]
    out = aligned_rows(len(hidden), problem.V, weight)
    blocks = 4 * -(-problem.V // gemm_config(hidden).block_v)
    maxima = hidden.new_empty(blocks, len(hidden), dtype=torch.float32)
    head = (hidden, weight, labels, None, 1.0, None)
    run: timer.Run = {
        "cuBLAS": lambda: torch.mm(hidden, weight.T, out=out),
        "logits": lambda: linear_softmax_fwd(*head, full=False, exps=out, block_max=maxima),
        "the": lambda: softmax_delta(*head, out),
    }[name.split()[0].rstrip(":")]
    found = _timed(run, device)
    flops = 2 * len(hidden) * problem.D * problem.V
    return found | _rate(flops, found) | {"rows": len(hidden)}


def _walked_chunk(problem: Problem, share: float, device: str) -> dict[str, Any]:
    """The product that skips blocks, with the first `share` of each row's blocks active."""
    from fastpref_kernels.launch import aligned_rows
    from fastpref_kernels.skipping import active_flags, active_mm

    inputs = rows.make_inputs(problem, device)
    weight = inputs.weight.detach()
    count = min(problem.T, max(1, 256 * MIB // (problem.V * weight.element_size())))
    delta = aligned_rows(count, problem.V, weight).normal_(std=problem.V**-0.5)
    active = active_flags(delta, weight)
    active[:, : max(1, round(share * active.shape[1]))] = 1
    direction = weight.new_empty(count, problem.D)

    def run() -> torch.Tensor:
        active_mm(delta, weight, active, direction)
        return direction

    found = _timed(run, device)
    return found | _rate(2 * count * problem.D * problem.V, found) | {"rows": count}


def _op(problem: Problem, device: str) -> dict[str, Any]:
    found = _timed(_ours(problem, rows.make_inputs(problem, device)), device)
    return found | _rate(problem.flops, found)


def _with_chunk(mib: int, problem: Problem, device: str) -> dict[str, Any]:
    with peers.setting(MODULE, "CHUNK_BYTES", mib * MIB):
        return _op(problem, device)


def _delta_panel(problem: Problem, device: str) -> dict[str, Any]:
    from fastpref_kernels import BACKEND

    x = rows.make_inputs(problem, device)
    hidden, weight = x.hidden.detach(), x.weight.detach()
    weight = weight[: max(1, 256 * MIB // (problem.T * weight.element_size()))]
    lse = ops.token_stats(hidden, x.weight, x.labels, impl="triton").lse
    found = _timed(lambda: BACKEND.delta_panel(hidden, weight, x.labels, 1.0, None, lse, 0), device)
    return found | _rate(2 * problem.T * problem.D * len(weight), found) | {"columns": len(weight)}


def _ours(problem: Problem, inputs: Inputs) -> timer.Run:
    for implementation in peers.implementations(inputs.hidden.device.type, ()):
        if implementation.name == "fastpref triton":
            return peers.prepare(implementation, problem, inputs)
    raise RuntimeError("impl='triton' is not available on this device")


def _timed(run: timer.Run, device: str) -> dict[str, Any]:
    times, failures = timer.interleave({"run": run}, device, timer.MIN_ROUNDS, "run")
    if failures:
        raise RuntimeError(failures["run"])
    return {"seconds": timer.summary(times["run"])}


def _rate(flops: float, found: dict[str, Any]) -> dict[str, float]:
    return {"tflops": flops / found["seconds"]["median"] / 1e12}


def _tables(name: str, dtype: str) -> dict[int, Any]:
    from fastpref_kernels import configs

    if dtype == "float32":
        return configs.FLOAT_GEMM
    return configs.HALF_GEMM if name == "gemm" else configs.HALF_PAIR


def candidates(name: str, dtype: str, device: str) -> list[tuple[int, str]]:
    """Places in the table of this device, and what stands there; the interpreter has one."""
    if device != "cuda":
        return [(0, "interpreter")]
    from fastpref_kernels.configs import table_arch

    table = _tables(name, dtype)[table_arch(torch.cuda.get_device_capability())]
    return [(i, "x".join(str(int(x)) for x in config)) for i, config in enumerate(table)]


def with_candidate(
    name: str, index: int, dtype: str, device: str, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `run` finds while one candidate is in use."""
    if device != "cuda":
        return run()
    with _first(name, index, dtype):
        return run()


@contextmanager
def _first(name: str, index: int, dtype: str) -> Iterator[None]:
    """Put one candidate at the front of its table, which is the one that is used."""
    from fastpref_kernels.configs import table_arch

    table = _tables(name, dtype)
    arch = table_arch(torch.cuda.get_device_capability())
    kept = table[arch]
    table[arch] = (kept[index], *kept[:index], *kept[index + 1 :])
    try:
        yield
    finally:
        table[arch] = kept
