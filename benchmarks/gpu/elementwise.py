"""The trunk's elementwise kernels on the GPU: rows of gpu/correctness.py and of gpu/ablation.py.

    err(ours) <= 2 err(PyTorch's code in the same dtype) + eps     relative, in the norm

against fp64. Times are next to PyTorch's code, liger-kernel's functions where they are installed,
and a copy that moves as many bytes as the operation has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastpref.bench import problems, timer
from fastpref.trunk import gated, norm, rotary
from fastpref.trunk.gated import Activation
from fastpref.trunk.norm import Norm

Check = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
Results = dict[str, Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


@dataclass(frozen=True)
class NormCase:
    shape: tuple[int, ...]
    offset: float = 0.0

    def tensors(self, normal: Callable[..., Tensor]) -> list[Tensor]:
        return [*(normal(*self.shape) for _ in range(3)), normal(self.shape[-1])]

    def run(self, grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> Results:
        constants = Norm(1e-6, self.offset)
        grad_x, grad_weight = norm.rms_norm_backward(grad, x, weight, constants, True, residual)
        frozen, _ = norm.rms_norm_backward(grad, x, weight, constants, False)
        value = norm.rms_norm(x, weight, constants)
        assert grad_weight is not None
        results = {"value": value, "x": grad_x, "x, frozen": frozen, "weight": grad_weight}
        rows, update = residual.flatten(0, -2), x.flatten(0, -2)
        weighted = weight, constants
        for name, before in (("", None), (" of norm", weighted)):
            added = norm.residual_rms_norm(rows, update.clone(), before, weighted)
            results |= {f"sum{name}": added[0], f"norm of sum{name}": added[1]}
        return results


@dataclass(frozen=True)
class RotaryCase:
    tokens: int
    heads: int
    key_heads: int
    size: int
    rotated: int

    def tensors(self, normal: Callable[..., Tensor]) -> list[Tensor]:
        joined = normal(self.tokens, self.heads + self.key_heads, self.size)
        angles = normal(self.tokens, self.rotated // 2).repeat(1, 2)
        return [*joined.split((self.heads, self.key_heads), dim=1), angles.cos(), angles.sin()]

    def run(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Results:
        forward, backward = (query.clone(), key.clone()), (query.clone(), key.clone())
        rotary.rotate(*forward, cos, sin)
        rotary.rotate_backward(*backward, cos, sin)
        names = ("query", "key", "grad query", "grad key")
        return dict(zip(names, (*forward, *backward), strict=True))


@dataclass(frozen=True)
class GatedCase:
    tokens: int
    width: int
    activation: Activation

    def tensors(self, normal: Callable[..., Tensor]) -> list[Tensor]:
        gate, up = normal(self.tokens, 2 * self.width).chunk(2, dim=1)
        return [normal(self.tokens, self.width), 2 * gate, up]

    def run(self, grad: Tensor, gate: Tensor, up: Tensor) -> Results:
        product = gated.gated(gate, up, self.activation)
        grads = gated.gated_backward(grad.clone(), gate, up, self.activation)
        return {"product": product, "grad gate": grads[0], "grad up": grads[1]}


Case = NormCase | RotaryCase | GatedCase
CASES: tuple[Case, ...] = (
    NormCase((3001, 4096)),
    NormCase((513, 576), offset=1.0),
    NormCase((257, 9, 128)),
    NormCase((33, 16384)),
    RotaryCase(1001, 32, 8, 128, 128),
    RotaryCase(127, 9, 3, 80, 40),
    GatedCase(1001, 14336, "silu"),
    GatedCase(127, 1537, "gelu_tanh"),
)
DRY_CASES: tuple[Case, ...] = (
    NormCase((5, 24)),
    RotaryCase(3, 4, 2, 8, 4),
    GatedCase(3, 20, "silu"),
    GatedCase(3, 20, "gelu_tanh"),
)


def checks(device: str, dry: bool) -> Iterator[Check]:
    """Every dtype and case."""
    for dtype in DTYPES:
        for case in DRY_CASES if dry else CASES:
            name = type(case).__name__.removesuffix("Case").lower()
            row = {"op": f"trunk, {name}", "dtype": str(dtype).removeprefix("torch.")}
            yield row | asdict(case), partial(check, case, dtype, device)


def check(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Errors of the kernels, the allowed errors, and whether they are met."""
    draw = torch.Generator(device).manual_seed(0)
    tensors = case.tensors(partial(torch.randn, generator=draw, device=device))
    tensors = [x.to(dtype) for x in tensors]
    ours, again = _results(case, tensors, _triton()), _results(case, tensors, _triton())
    if not all(torch.equal(ours[name], again[name]) for name in ours):
        raise RuntimeError("two calls with the same inputs differ")
    plain = _results(case, tensors, None)
    exact = _results(case, [x.double() for x in tensors], None)
    errors = {}
    for name, value in exact.items():
        error, error_of_torch = (
            float((x[name].double() - value).norm() / value.norm()) for x in (ours, plain)
        )
        errors[name] = {"error": error, "allowed": 2 * error_of_torch + EPS[dtype]}
    return {"errors": errors, "met": all(e["error"] <= e["allowed"] for e in errors.values())}


def timings(device: str, dry: bool) -> Iterator[Check]:
    """Each operation at the shapes of a Llama of 8B."""
    sizes = (6, 32, 4, 2, 8, 48) if dry else (8192, 4096, 32, 8, 128, 14336)
    tokens, width, heads, key_heads, size, inner = sizes
    dtype = getattr(torch, "float32" if dry else problems.DTYPE[device])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def norms() -> dict[str, Any]:
        return _norm_runs(normal(tokens, width), normal(tokens, width), normal(width))

    def rotations() -> dict[str, Any]:
        angles = normal(tokens, size // 2).repeat(1, 2)
        query, key = normal(tokens, heads, size), normal(tokens, key_heads, size)
        return _rotary_runs(query, key, angles.cos(), angles.sin())

    def products() -> dict[str, Any]:
        # The backward pass overwrites grad by grad silu(gate): near 1, so that repeats stay finite.
        gate = 1.28 + 0.01 * normal(tokens, inner)
        return _gated_runs(normal(tokens, inner), gate, normal(tokens, inner))

    for make, name, pieces in (
        (norms, "rms_norm", 2 * tokens * width),
        (norms, "residual rms_norm", 4 * tokens * width),
        (norms, "rms_norm backward", 3 * tokens * width),
        (norms, "rms_norm backward with residual", 4 * tokens * width),
        (rotations, "rotary", (2 * (heads + key_heads) + 1) * tokens * size),
        (products, "gated", 3 * tokens * inner),
        (products, "gated backward", 5 * tokens * inner),
    ):
        part = {"part": f"{name}, {tokens} tokens: seconds"}
        yield part, partial(_time, make, name, pieces * dtype.itemsize, device)


def _time(
    make: Callable[[], dict[str, dict[str, timer.Run]]], name: str, size: int, device: str
) -> dict[str, Any]:
    """Seconds, and bytes that the operation has to move by its time."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source), **make()[name]}
    with _kernels(None):
        times, failures = timer.interleave(runs, device, 4 * timer.MIN_ROUNDS, "copy")
    summaries = {run: timer.summary(seconds) for run, seconds in times.items()}
    speeds = {run: size / seconds["median"] / 1e9 for run, seconds in summaries.items()}
    row = {"seconds": summaries, "gigabytes": speeds}
    return row | {"broken": failures} if failures else row


def _norm_runs(grad: Tensor, x: Tensor, weight: Tensor) -> dict[str, dict[str, timer.Run]]:
    constants = Norm(1e-6, 0.0)
    backward = grad, x, weight, constants, False
    runs = {
        "rms_norm": _ours(norm, "rms_norm", x, weight, constants),
        "residual rms_norm": _ours(
            norm, "residual_rms_norm", x, grad.clone(), None, (weight, constants)
        ),
        "rms_norm backward": _ours(norm, "rms_norm_backward", *backward),
        "rms_norm backward with residual": _ours(norm, "rms_norm_backward", *backward, grad),
    }
    if _has_liger(x):
        from liger_kernel.ops import fused_add_rms_norm
        from liger_kernel.ops import rms_norm as liger

        _, flat, rstd, *settings, mode = liger.rms_norm_forward(x, weight, 1e-6, 0.0, "gemma", None)
        runs["rms_norm"]["liger"] = lambda: liger.rms_norm_forward(
            x, weight, 1e-6, 0.0, "gemma", None
        )
        runs["residual rms_norm"]["liger"] = lambda: fused_add_rms_norm.fused_add_rms_norm_forward(
            grad, x, weight, 1e-6, 0.0, "gemma"
        )
        runs["rms_norm backward"]["liger"] = lambda: liger.rms_norm_backward(
            grad, flat, weight, rstd, 0.0, mode, *settings, False, None, needs_dw=False
        )
    return runs


def _rotary_runs(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> dict[str, dict[str, timer.Run]]:
    runs = _ours(rotary, "rotate", query, key, cos, sin)
    if _has_liger(query):
        from liger_kernel.ops import rope as liger

        heads_first = [x.transpose(0, 1)[None] for x in (query, key)]
        runs["liger"] = lambda: liger.rope_forward(*heads_first, cos[None], sin[None])
    return {"rotary": runs}


def _gated_runs(grad: Tensor, gate: Tensor, up: Tensor) -> dict[str, dict[str, timer.Run]]:
    runs = {
        "gated": _ours(gated, "gated", gate, up, "silu"),
        "gated backward": _ours(gated, "gated_backward", grad, gate, up, "silu"),
    }
    if _has_liger(gate):
        from liger_kernel.ops import swiglu as liger

        overwritten = gate.clone(), up.clone()
        runs["gated"]["liger"] = lambda: liger.swiglu_forward(gate, up)
        runs["gated backward"]["liger"] = lambda: liger.swiglu_backward(*overwritten, grad)
    return runs


def _ours(module: ModuleType, name: str, *arguments: Any) -> dict[str, timer.Run]:
    """The kernel, and PyTorch's code, which runs while kernels are off."""
    return {
        "fastpref triton": partial(getattr(_triton(), name), *arguments),
        "fastpref torch": partial(getattr(module, name), *arguments),
    }


def _results(case: Case, tensors: list[Tensor], kernels: Any) -> Results:
    with _kernels(kernels):
        return case.run(*tensors)


@contextmanager
def _kernels(kernels: Any) -> Iterator[None]:
    """Context manager in which the trunk runs these kernels, or PyTorch's code for None."""
    with ExitStack() as stack:
        for module in (norm, rotary, gated):
            stack.enter_context(patch.object(module, "kernels_for", lambda _: kernels))
        yield


def _triton() -> Any:
    from fastpref_kernels import trunk

    return trunk


def _has_liger(x: Tensor) -> bool:
    return x.is_cuda and find_spec("liger_kernel") is not None
