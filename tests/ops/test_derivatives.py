"""Derivatives other than the first of `torch.autograd`: refused by name, or those of plain ops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.utils.checkpoint import checkpoint

from fastpref import ops
from fastpref.attention import packed_attention, rows
from fastpref.ops import cpu
from fastpref.ops.divergence import linear_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_UNAVAILABLE = cpu.unavailable_reason(DEVICE)
BUILT = pytest.mark.skipif(bool(CPU_UNAVAILABLE), reason=CPU_UNAVAILABLE)
FUSED = [pytest.param("cpu", marks=BUILT), "chunked", "triton"]
T, D, V = 5, 4, 9
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, OTHER, OTHER_WEIGHT, TANGENT = (
    torch.randn(n, D, generator=G).to(DEVICE) for n in (T, V, T, V, T)
)
LABELS = torch.tensor([1, 8, -100, 0, 3], device=DEVICE)
OFFSETS = torch.tensor([0, 2, 2, 3, 5], device=DEVICE)
Function = Callable[..., Tensor]

OPS: dict[str, Callable[[str], Function]] = {
    "linear_logps": lambda impl: (
        lambda h, w=WEIGHT: ops.linear_logps(h, w, LABELS, softcap=3.0, impl=impl)
    ),
    "linear_logps_and_scores": lambda impl: (
        lambda h, w=WEIGHT: ops.linear_logps_and_scores(h, w, LABELS, 3, softcap=3.0, impl=impl)[0]
    ),
    "linear_kl": lambda impl: (
        lambda h, w=WEIGHT: ops.linear_kl(h, w, OTHER, OTHER_WEIGHT, impl=impl)
    ),
}


def plain_logps(hidden: Tensor, weight: Tensor = WEIGHT) -> Tensor:
    logps = (3 * torch.tanh(hidden @ weight.T / 3)).log_softmax(1)
    kept = LABELS >= 0
    return logps.gather(1, LABELS.clamp(min=0)[:, None])[:, 0] * kept


def penalized(function: Function, trained: bool = False) -> Tensor:
    """Gradient of a loss with a penalty on its gradient, whose upstream is a constant."""
    hidden = HIDDEN.clone().requires_grad_()
    loss = function(hidden, WEIGHT.clone().requires_grad_(trained)).sum()
    (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
    return torch.autograd.grad(loss + slope.square().sum(), hidden)[0]


def in_forward_mode(function: Function) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(HIDDEN, TANGENT))).tangent


SECOND_ORDER: dict[str, Callable[[Function], Any]] = {
    "penalty": penalized,
    "penalty, trained head": lambda f: penalized(f, trained=True),
    "hvp": lambda f: hvp(lambda h: f(h).sum(), HIDDEN, TANGENT)[1],
    "hessian": lambda f: hessian(lambda h: f(h).sum(), HIDDEN),
}
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (HIDDEN,), (TANGENT,))[1],
    "forward mode": in_forward_mode,
    "grad": lambda f: torch.func.grad(lambda h: f(h).sum())(HIDDEN),
    "jacrev": lambda f: torch.func.jacrev(f)(HIDDEN),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([HIDDEN, TANGENT])),
    "compiled jvp": lambda f: torch.func.jvp(
        torch.compile(f, backend="aot_eager"), (HIDDEN,), (TANGENT,)
    )[1],
}


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused_by_the_name_of_the_op(op: str, impl: str) -> None:
    name = "linear_logps" if op == "linear_logps_and_scores" else op
    for differentiate in SECOND_ORDER.values():
        with pytest.raises(RuntimeError, match=rf"{name}: its gradient has no derivative"):
            differentiate(OPS[op](impl))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_and_transforms_are_refused_by_the_name_of_the_op(op: str, impl: str) -> None:
    torch._dynamo.reset()
    for differentiate in TRANSFORMS.values():
        with pytest.raises(RuntimeError, match=rf"{op}: has the gradient of torch.autograd alone"):
            differentiate(OPS[op](impl))


@pytest.mark.parametrize("op", ["linear_logps", "linear_logps_and_scores"])
@pytest.mark.parametrize("kind", [*SECOND_ORDER, *list(TRANSFORMS)[:-1]])
def test_the_reference_has_all_of_them(kind: str, op: str) -> None:
    differentiate = (SECOND_ORDER | TRANSFORMS)[kind]
    torch.testing.assert_close(differentiate(OPS[op]("reference")), differentiate(plain_logps))


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_statistics_are_constants_in_forward_mode_too(impl: str) -> None:
    def statistics(hidden: Tensor) -> Tensor:
        stats = ops.token_stats(hidden, WEIGHT, LABELS, impl=impl)
        other = ops.collision_entropy(hidden, WEIGHT, LABELS, impl=impl)
        cosine = ops.score_geometry(hidden, WEIGHT, LABELS, OFFSETS, impl=impl).cosine
        return stats.entropy.sum() + stats.lse.sum() + other.sum() + cosine

    value, slope = torch.func.jvp(statistics, (HIDDEN,), (TANGENT,))
    assert value == statistics(HIDDEN) != 0 and slope == 0
    assert not torch.func.grad(statistics)(HIDDEN).any()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_graph_is_used_twice_and_made_again_in_a_checkpoint(impl: str) -> None:
    grads = []
    for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        logps = run(OPS["linear_logps"](impl), *leaves)
        logps.sum().backward(retain_graph=True)
        logps.sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    expected = torch.autograd.grad(2 * plain_logps(*leaves).sum(), leaves)
    torch.testing.assert_close(grads[0], list(expected))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_numbers_are_symbols_of_a_dynamic_graph(impl: str) -> None:
    torch._dynamo.reset()

    def logps(hidden: Tensor, labels: Tensor, scale: float, cap: float) -> Tensor:
        return ops.linear_logps(hidden, WEIGHT, labels, logit_scale=scale, softcap=cap, impl=impl)

    compiled = torch.compile(logps, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, scale, cap in ((5, 0.5, 2.0), (3, 2.0, 7.0)):
        x = HIDDEN[:tokens], LABELS[:tokens], scale, cap
        assert torch.equal(compiled(*x), logps(*x))


@pytest.mark.parametrize("kind", ["jvp", "forward mode", "grad", "jacrev", "vmap", "hvp"])
def test_a_segment_sum_has_all_derivatives(kind: str) -> None:
    def by_op(values: Tensor) -> Tensor:
        return ops.segment_sum(values[:, 0], OFFSETS) ** 2

    def plain(values: Tensor) -> Tensor:
        column = values[:, 0]
        ends = OFFSETS.tolist()
        sums = [column[a:b].sum() for a, b in pairwise(ends)]
        return torch.stack(sums) ** 2

    differentiate = (SECOND_ORDER | TRANSFORMS)[kind]
    torch.testing.assert_close(differentiate(by_op), differentiate(plain))


def test_packed_attention_refuses_them() -> None:
    x = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = packed_attention(x, x, x, rows(1, 4))
    with pytest.raises(RuntimeError, match="packed_attention: its gradient has no derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="packed_attention: has the gradient of torch"):
        torch.func.jvp(lambda x: packed_attention(x, x, x, rows(1, 4)), (x,), (x,))


def test_a_divergence_refuses_them() -> None:
    def divergence(hidden: Tensor) -> Tensor:
        return linear_divergence(hidden, WEIGHT, OTHER, OTHER_WEIGHT)

    with pytest.raises(RuntimeError, match="linear_divergence: its gradient has no derivative"):
        penalized(lambda h, w: divergence(h))
    with pytest.raises(RuntimeError, match="linear_divergence: has the gradient of torch"):
        in_forward_mode(divergence)
