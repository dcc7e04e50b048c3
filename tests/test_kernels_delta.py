"""delta, the derivative of a log-prob by its products, from both of its kernels."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref_kernels.delta import linear_delta, softmax_delta
from fastpref_kernels.launch import aligned_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, D, V = 17, 48, 101  # two row blocks, four tiles in two panels, the last one partly past V
SCALES = [pytest.param(1.0, None, id="plain"), pytest.param(0.5, 5.0, id="scale, softcap")]


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, D, generator=draw), torch.randn(V, D, generator=draw)
    labels = torch.randint(V, (T,), generator=draw)
    labels[3] = -100
    bias = torch.randn(V, generator=draw)
    return (
        hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE),
        bias.to(DEVICE, dtype),
    )  # fmt: skip


def exact_delta(hidden, weight, labels, bias, scale, softcap) -> Tensor:
    products = (hidden.double() @ weight.double().T).requires_grad_()
    x = scale * (products + bias.double())
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    logps = x.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    (delta,) = torch.autograd.grad(logps[labels != -100].sum(), products)
    return delta


# 2^-8 on a GPU; the interpreter truncates to bf16 where a GPU rounds to the nearest.
BF16 = 2**-8 if torch.cuda.is_available() else 2**-7


# Per entry: two roundings of p in softmax_delta, one in linear_delta; with a soft cap the first
# also reads the logit back from its rounded exponential, one rounding off, which moves the
# cap's derivative by at most 2 / softcap of that. 2e-5 for fp32 logits of about 30.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), SCALES)
def test_both_kernels_match_fp64_entry_by_entry(dtype, scale, softcap) -> None:
    hidden, weight, labels, bias = make(dtype)
    exact = exact_delta(hidden, weight, labels, bias, scale, softcap)
    unit = BF16 if dtype == torch.bfloat16 else 2**-24

    delta = aligned_rows(T, V, hidden)
    stats = softmax_delta(hidden, weight, labels, bias, scale, softcap, delta)
    capped = 0.0 if softcap is None else 2 * unit / softcap
    assert ((delta - exact).abs() <= (2.1 * unit + 2e-5 + capped) * exact.abs() + capped).all()

    again = linear_delta(
        hidden, weight, labels, bias, scale, softcap, stats.lse, aligned_rows(T, V, hidden)
    )
    assert ((again - exact).abs() <= (1.1 * unit + 2e-5) * exact.abs() + 1e-7).all()
    assert (delta[3] == 0).all() and (again[3] == 0).all()


def test_columns_of_the_vocabulary_are_columns_of_delta() -> None:
    hidden, weight, labels, bias = make(torch.float32)
    stats = softmax_delta(hidden, weight, labels, bias, 1.0, None, aligned_rows(T, V, hidden))
    whole, parts = aligned_rows(T, V, hidden), aligned_rows(T, V, hidden)
    linear_delta(hidden, weight, labels, bias, 1.0, None, stats.lse, whole)
    for start, stop in ((0, 40), (40, 41), (41, V)):
        part = linear_delta(
            hidden, weight[start:stop], labels, bias[start:stop], 1.0, None, stats.lse,
            aligned_rows(T, stop - start, hidden), start,
        )  # fmt: skip
        parts[:, start:stop] = part
    # A column moves within its tile, which lets the interpreter's GEMM sum in another order.
    assert torch.allclose(whole, parts, rtol=1e-5, atol=0)


def test_nothing_is_written_past_the_vocabulary() -> None:
    """Rows are padded to 16 bytes; a kernel that wrote there would reach the next row's start."""
    hidden, weight, labels, bias = make(torch.float32)
    padded = torch.full((T + 1, V + 3), 7.0, device=DEVICE)
    stats = softmax_delta(hidden, weight, labels, bias, 1.0, None, padded[:T, :V])
    linear_delta(hidden, weight, labels, bias, 1.0, None, stats.lse, padded[:T, :V])
    assert (padded[:, V:] == 7).all() and (padded[T] == 7).all()
