"""Attention over packed rows against fp64 on the GPU; rows of gpu/correctness.py.

    err(ours) <= 2 err(PyTorch in the same dtype) + eps     relative, in the norm

of the output and of the three gradients, by each implementation that runs here. PyTorch in the same
dtype rounds scores and weights to it, as a model without fused attention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastpref.attention import Segments, packed_attention, reference

Check = tuple[dict[str, Any], Callable[[], dict[str, Any]]]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One rounding to the dtype; fp32 scores of up to 30 have a relative error of 2e-6 in a weight.
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """Segments that no tile divides, heads and options."""

    groups: tuple[tuple[int, ...], ...]
    heads: int
    key_heads: int
    size: int
    window: int | None = None
    softcap: float | None = None


ROW = ((300, 257, 1, 130), (1, 64), (65,), (511, 90, 90))
CASES = (
    Case(ROW, 8, 2, 128),
    Case(ROW, 4, 4, 64),
    Case(ROW, 4, 1, 80),
    Case(ROW, 4, 4, 96),
    Case(ROW, 4, 2, 256, softcap=20.0),
    Case(ROW, 4, 2, 256, window=200, softcap=20.0),
    Case(ROW, 4, 2, 128, window=1),
    Case(ROW, 4, 2, 128, window=200),
    Case(ROW, 4, 2, 128, window=400, softcap=20.0),
)
DRY_CASES = (Case(((5, 17), (3,)), 2, 1, 16), Case(((5, 17),), 1, 1, 16, window=6, softcap=2.0))


def checks(device: str, dry: bool) -> Iterator[Check]:
    """Every implementation, dtype and case; flash-attn where it is installed."""
    has_flash = not dry and find_spec("flash_attn") is not None
    for dtype in DTYPES:
        for case in DRY_CASES if dry else CASES:
            for impl in ["triton", *(["flash"] if has_flash and dtype != torch.float32 else [])]:
                row = {
                    "op": f"packed_attention, {impl}",
                    "dtype": str(dtype).removeprefix("torch."),
                }
                yield row | asdict(case), partial(check, impl, case, dtype, device)


def check(impl: str, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Errors of one implementation, the allowed errors, and whether they are met."""
    segments = Segments(case.groups)
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(segments.tokens, heads, case.size) for heads in (case.heads, *2 * [case.key_heads])]
    inputs = [torch.randn(shape, generator=draw, device=device).to(dtype) for shape in shapes]
    grad = torch.randn(shapes[0], generator=draw, device=device).to(dtype)
    options: dict[str, Any] = {"window": case.window, "softcap": case.softcap}
    ours = _results(partial(packed_attention, impl=impl, **options), inputs, grad, segments)
    again = _results(partial(packed_attention, impl=impl, **options), inputs, grad, segments)
    if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
        raise RuntimeError("two calls with the same inputs differ")
    exactly = partial(reference.packed_attention, scale=case.size**-0.5, **options)
    wide = [x.double() for x in inputs]
    exact = _results(exactly, wide, grad.double(), segments)
    plain = _results(partial(_plain, **options), inputs, grad, segments)
    errors = {}
    names = ("output", "grad query", "grad key", "grad value")
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        # Under a window of one token the gradients of query and key are 0.
        scale = max(float(c.norm()), 1.0)
        allowed = 2 * float((b.double() - c).norm()) / scale + EPS[dtype]
        errors[name] = {"error": float((a.double() - c).norm()) / scale, "allowed": allowed}
    return {"errors": errors, "met": all(e["error"] <= e["allowed"] for e in errors.values())}


def _results(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, segments: Segments
) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, segments)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    share = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(share, dim=0) for x in (k, v))
    scores = query.shape[2] ** -0.5 * (q @ k.transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = reference.mask(segments, window, query.device)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
