"""KL(reference || policy) against fp64: values, both gradients, equal and distant models."""

import os

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.helpers.dispatch import Inside

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import ops
from fastpref.ops import chunked, cpu
from fastpref_kernels import linear_kl as module
from fastpref_kernels.common import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative errors in the norm: the roundings of p - q, of its GEMM and of the scaled row, about two
# units in all, and the error that fp32 logits of up to 60 cause in a probability: 60 / 2^24.
TOLERANCE = {
    torch.float32: 4e-6,
    torch.bfloat16: 2 * 2**-8,
    torch.float16: 2 * 2**-11,
}


@pytest.fixture(params=["cpu", "chunked", "triton"])
def linear_kl(request):
    """The op by one implementation; "cpu" and "chunked" only differ in their row passes."""
    impl = request.param
    if impl == "cpu" and (reason := cpu.unavailable_reason(DEVICE)):
        pytest.skip(f"impl 'cpu' {reason}")

    def run(hidden: Tensor, *others: Tensor, **options: object) -> Tensor:
        half = impl == "cpu" and hidden.dtype != torch.float32
        return ops.linear_kl(hidden, *others, impl="chunked" if half else impl, **options)

    return run


def small_chunks(monkeypatch, V: int) -> None:
    """Set chunks of 7 rows in every implementation."""
    monkeypatch.setattr(module, "rows_per_chunk", lambda width, element_size, budget: 7)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 7 * 2 * 4 * V)


def make(T: int, D: int, E: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, ref_hidden, ref_weight; the first two require a gradient."""
    draw = torch.Generator().manual_seed(T + D + V)
    shapes = ((T, D), (V, D), (T, E), (V, E))
    tensors = [torch.randn(s, generator=draw).to(DEVICE, dtype) for s in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3]


def check(linear_kl, tensors: tuple[Tensor, ...], *, scale=1.0, softcap=None) -> None:
    draw = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(tensors[0]), generator=draw).to(DEVICE)
    kl = linear_kl(*tensors, logit_scale=scale, softcap=softcap)
    kl.backward(upstream)

    leaves = [x.detach().double().requires_grad_() for x in tensors]
    logits = [scale * leaves[0] @ leaves[1].T, scale * leaves[2] @ leaves[3].T]
    if softcap is not None:
        logits = [softcap * torch.tanh(x / softcap) for x in logits]
    logp, logq = (x.log_softmax(1) for x in logits)
    exact = (logq.exp() * (logq - logp)).sum(1)
    exact.backward(upstream.double())
    # Each of the T sums has the size of the KL itself; 1e-5 for the two log-sum-exps.
    assert ((kl - exact).abs() <= 1e-5 + 1e-6 * exact).all()
    for got, leaf in zip(tensors[:2], leaves[:2], strict=True):
        error = (got.grad.double() - leaf.grad).norm() / leaf.grad.norm().clamp(min=1e-12)
        assert error <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_fp64_where_nothing_divides_a_block(linear_kl, dtype, monkeypatch) -> None:
    small_chunks(monkeypatch, 101)
    check(linear_kl, make(17, 33, 40, 101, dtype))


def test_scale_and_softcap(linear_kl) -> None:
    check(linear_kl, make(9, 16, 24, 70), scale=0.25, softcap=5.0)


def test_one_token(linear_kl) -> None:
    check(linear_kl, make(1, 16, 16, 40))


def test_far_apart(linear_kl) -> None:
    check(linear_kl, make(5, 16, 16, 70), scale=8.0)


def test_pointers_instead_of_descriptors(linear_kl, monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETER_GEMM", launch.INTERPRETER_GEMM._replace(tma=False))
    check(linear_kl, make(9, 16, 24, 70))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_policy_that_is_its_reference_has_no_gradient(linear_kl, dtype) -> None:
    hidden, weight, *_ = make(9, 16, 16, 70, dtype)
    kl = linear_kl(hidden, weight, hidden.detach(), weight.detach())
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_a_small_step_from_the_reference_keeps_its_gradient_in_bf16(linear_kl) -> None:
    """If nearly equal p and q were rounded separately, p - q would be noise."""
    hidden, weight, *_ = make(9, 16, 16, 70, torch.bfloat16)
    with torch.no_grad():
        weight[:, 0] = 0.01 * weight[:, 1]
        ref_hidden = hidden.detach().clone()
        ref_hidden[:, 0] += 1
    check(linear_kl, (hidden, weight, ref_hidden, weight.detach().clone()))


def test_the_reference_gets_no_gradient_and_frozen_parts_none(linear_kl) -> None:
    hidden, weight, ref_hidden, ref_weight = make(5, 16, 16, 40)
    ref_hidden.requires_grad_()
    linear_kl(hidden, weight.detach(), ref_hidden, ref_weight).sum().backward()
    assert weight.grad is None and ref_hidden.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not linear_kl(hidden, weight, ref_hidden, ref_weight).requires_grad


def test_no_tokens(linear_kl) -> None:
    tensors = make(0, 16, 16, 32)
    linear_kl(*tensors).sum().backward()
    assert (tensors[1].grad == 0).all()


def test_no_two_panels_of_logits_are_alive_at_once(monkeypatch) -> None:
    """The backward pass of a trained head has one buffer for both models, not one per panel."""
    T, V, budget = 64, 4096, 2 * 4 * 64 * 512  # eight panels of 512 columns
    monkeypatch.setattr(chunked, "CHUNK_BYTES", budget)
    hidden, weight, ref_hidden, ref_weight = make(T, 2, 2, V)
    kl = ops.linear_kl(hidden, weight, ref_hidden, ref_weight, impl="chunked")
    panels: list[StorageWeakRef] = []
    most = 0

    class Watch(Inside):
        def seen(self, func, args, out):
            nonlocal most
            if isinstance(out, Tensor) and out.untyped_storage().nbytes() == budget:
                panels.append(StorageWeakRef(out.untyped_storage()))
            most = max(most, len({p.cdata for p in panels if not p.expired()}))

    with Watch():
        kl.sum().backward()
    assert most == 1


def test_the_gradient_computes_each_product_once(monkeypatch) -> None:
    """Two products for the logits of both models and one for the gradient, in every chunk."""
    small_chunks(monkeypatch, 100)
    launches = {"linear_kl_fwd_kernel": 0, "kl_dlogits_kernel": 0, "logits_to_dlogits_kernel": 0}
    for name in launches:
        kernel = getattr(module, name)

        class Counted:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                launches[self.name] += 1
                return self.kernel[grid]

        monkeypatch.setattr(module, name, Counted(name, kernel))
    hidden, weight, ref_hidden, ref_weight = make(20, 16, 16, 100)
    weight = weight.detach()
    ops.linear_kl(hidden, weight, ref_hidden, ref_weight, impl="triton").sum().backward()
    chunks = 3  # of seven rows
    assert launches == {
        "linear_kl_fwd_kernel": chunks,
        "kl_dlogits_kernel": 0,
        "logits_to_dlogits_kernel": chunks,
    }
