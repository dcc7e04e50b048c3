"""Labels and offsets out of range, and DTensors: one message for all implementations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ops
from fastpref.ops import cpu

CPU_UNAVAILABLE = cpu.unavailable_reason("cpu")
BUILT = pytest.mark.skipif(bool(CPU_UNAVAILABLE), reason=CPU_UNAVAILABLE)
IMPLEMENTATIONS = [pytest.param("cpu", marks=BUILT), "chunked", "reference", "triton"]
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
T, D, V = 4, 3, 5
HIDDEN, WEIGHT = torch.ones(T, D), torch.ones(V, D)
LABELS, OFFSETS = torch.tensor([0, 4, -100, 2]), torch.tensor([0, 2, 4])

OPS: dict[str, Callable[..., Any]] = {
    "linear_logps": ops.linear_logps,
    "linear_logps_and_scores": lambda h, w, y, **k: ops.linear_logps_and_scores(h, w, y, 2, **k),
    "token_stats": ops.token_stats,
    "collision_entropy": ops.collision_entropy,
    "score_geometry": lambda h, w, y, **k: ops.score_geometry(h, w, y, OFFSETS, **k),
}


@each_implementation
@pytest.mark.parametrize("op", OPS)
def test_a_label_out_of_range_is_named(op: str, impl: str) -> None:
    OPS[op](HIDDEN, WEIGHT, LABELS, impl=impl)
    message = r"labels: expected -100 or an index below 5, the rows of weight, got 1 of 4 out of"
    for label in (5, -1, -101, 2**31 - 1):
        for dtype in (torch.int32, torch.int64):
            labels = LABELS.clone().to(dtype)
            labels[2] = label
            with pytest.raises(ValueError, match=message):
                OPS[op](HIDDEN, WEIGHT, labels, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_compiled_graph_names_it_too(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda y, ends: ops.segment_sum(ops.linear_logps(HIDDEN, WEIGHT, y, impl=impl), ends),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(LABELS, OFFSETS)
    with pytest.raises(ValueError, match=r"labels: expected -100 or an index below 5.* 4 of 4"):
        compiled(LABELS + V + 100, OFFSETS)
    with pytest.raises(ValueError, match=r"cu_seqlens: must rise from 0 to 4.*got 3 as the last"):
        compiled(LABELS, OFFSETS.clamp(max=3))


BAD_OFFSETS = [
    ([1, 2, 4], "got 1 as the first"),
    ([-1, 2, 4], "got -1 as the first"),
    ([0, 2, 3], "got 3 as the last"),
    ([0, 2, 5], "got 5 as the last"),
    ([0, 5, 4], "got 4 after 5"),
    ([0, -2, 4], "got -2 after 0"),
]


@each_implementation
@pytest.mark.parametrize(("ends", "problem"), BAD_OFFSETS)
def test_offsets_out_of_range_are_named(ends: list[int], problem: str, impl: str) -> None:
    message = rf"cu_seqlens: must rise from 0 to 4, the number of tokens, {problem}"
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor(ends, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            ops.score_geometry(HIDDEN, WEIGHT, LABELS, offsets, impl=impl)
        with pytest.raises(ValueError, match=message):
            ops.segment_sum(torch.ones(T), offsets)


class Sharded(torch.Tensor):
    """A tensor with the mark of a DTensor, which needs a process group."""

    device_mesh = "mesh"


def sharded(tensor: Tensor) -> Tensor:
    return tensor.clone().as_subclass(Sharded)  # type: ignore[no-any-return]


HEAD_OPERANDS = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": torch.ones(V)}


@each_implementation
@pytest.mark.parametrize("name", HEAD_OPERANDS)
@pytest.mark.parametrize("op", list(OPS)[:-1])
def test_a_sharded_operand_is_named(op: str, name: str, impl: str) -> None:
    operands = HEAD_OPERANDS | {name: sharded(HEAD_OPERANDS[name])}
    arguments = [operands.pop(each) for each in ("hidden", "weight", "labels")]
    with pytest.raises(ValueError, match=rf"^{name}: got a DTensor, of which this rank holds a"):
        OPS[op](*arguments, **operands, impl=impl)


@each_implementation
def test_other_sharded_operands_are_named(impl: str) -> None:
    kl = {"hidden": HIDDEN, "weight": WEIGHT, "ref_hidden": HIDDEN, "ref_weight": WEIGHT}
    geometry = {
        "hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "cu_seqlens": OFFSETS,
        "token_weights": torch.ones(T),
    }  # fmt: skip
    for op, operands in ((ops.linear_kl, kl), (ops.score_geometry, geometry)):
        for name, operand in operands.items():
            with pytest.raises(ValueError, match=rf"^{name}: got a DTensor"):
                op(**(operands | {name: sharded(operand)}), impl=impl)  # type: ignore[operator]
    for name, arguments in (
        ("values", (sharded(torch.ones(T)), OFFSETS)),
        ("cu_seqlens", (torch.ones(T), sharded(OFFSETS))),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: got a DTensor"):
            ops.segment_sum(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
def test_a_gpu_stops_at_a_label_out_of_range(impl: str) -> None:
    """In a process of its own, since the GPU is of no use to it afterwards."""
    code = (
        "import torch\nfrom fastpref import ops\n"
        "x = torch.ones(4, 16, device='cuda')\n"
        f"ops.linear_logps(x, x, torch.full((4,), 4, device='cuda'), impl={impl!r})\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode and "labels: expected -100 or an index below 4" in done.stderr
