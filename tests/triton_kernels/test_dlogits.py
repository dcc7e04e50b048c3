"""dlogits, the gradient of a log-prob by the raw logits, from both of its kernels."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref.ops.backend import Head
from fastpref_kernels.common.launch import aligned_rows
from fastpref_kernels.dlogits import linear_dlogits, softmax_dlogits
from fastpref_kernels.softmax_stats import TokenStats

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


def exact_dlogits(hidden, weight, labels, bias, scale, softcap) -> Tensor:
    raw = (hidden.double() @ weight.double().T).requires_grad_()
    x = scale * (raw + bias.double())
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    logps = x.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    (dlogits,) = torch.autograd.grad(logps[labels != -100].sum(), raw)
    return dlogits


# 2^-8 on a GPU; the interpreter truncates to bf16 where a GPU rounds to the nearest.
BF16 = 2**-8 if torch.cuda.is_available() else 2**-7


def scaled_softmax_dlogits(inputs, scale=1.0, softcap=None, out=None) -> tuple[Tensor, TokenStats]:
    """dlogits times their row scale, in fp32, and the statistics."""
    hidden, weight, labels, bias = inputs
    dlogits = aligned_rows(T, V, hidden) if out is None else out
    row_scale = torch.empty(T, device=DEVICE)
    head = Head(weight, bias, scale, softcap)
    stats = softmax_dlogits(hidden, head, labels, dlogits, row_scale)
    return row_scale[:, None] * dlogits.float(), stats


# Per entry: one rounding of p, and 2e-5 for fp32 logits of about 30.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "softcap"), SCALES)
def test_both_kernels_match_fp64_entry_by_entry(dtype, scale, softcap) -> None:
    hidden, weight, labels, bias = make(dtype)
    exact = exact_dlogits(hidden, weight, labels, bias, scale, softcap)
    unit = {torch.bfloat16: BF16, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    # A slope close to 0 is as exact as the logit; fp16 has no small numbers.
    least = 1e-7 if dtype != torch.float16 else 2**-24
    allowed = (1.1 * unit + 2e-5) * exact.abs() + least

    dlogits, stats = scaled_softmax_dlogits((hidden, weight, labels, bias), scale, softcap)
    assert ((dlogits - exact).abs() <= allowed).all()
    head = Head(weight, bias, scale, softcap)
    recomputed = linear_dlogits(hidden, head, labels, stats.lse, aligned_rows(T, V, hidden))
    assert ((recomputed - exact).abs() <= allowed).all()
    assert (dlogits[3] == 0).all() and (recomputed[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [30.0, 47.0, 49.0, 80.0, 300.0, 5000.0])
def test_an_unlikely_label_has_exact_dlogits(dtype, distance) -> None:
    """A row is shifted by its label's logit unless that is too far from the log-sum-exp."""
    hidden, weight, labels, bias = make(dtype)
    hidden, weight = hidden / 8, weight / 8
    unlikely = labels[5]
    bias[unlikely] -= distance
    inputs = hidden, weight, labels, bias
    dlogits, stats = scaled_softmax_dlogits(inputs)
    exact = exact_dlogits(*inputs, 1.0, None)
    unit = BF16 if dtype == torch.bfloat16 else 2**-24
    assert stats.logps[5] < 5 - distance
    assert ((dlogits - exact).abs() <= (1.1 * unit + 2e-5) * exact.abs() + 1e-7).all()


def test_logits_far_from_zero_have_exact_dlogits() -> None:
    hidden, weight, labels, bias = make(torch.float32)
    for offset in (-3000.0, 3000.0):
        inputs = hidden, weight, labels, bias + offset
        exact = exact_dlogits(*inputs, 1.0, None)
        dlogits, _ = scaled_softmax_dlogits(inputs)
        assert ((dlogits - exact).abs() <= 1e-3 * exact.abs() + 1e-7).all()


def test_columns_of_the_vocabulary_are_columns_of_dlogits() -> None:
    hidden, weight, labels, bias = make(torch.float32)
    head = Head(weight, bias)
    _, stats = scaled_softmax_dlogits((hidden, weight, labels, bias))
    whole, parts = aligned_rows(T, V, hidden), aligned_rows(T, V, hidden)
    linear_dlogits(hidden, head, labels, stats.lse, whole)
    for start, stop in ((0, 40), (40, 41), (41, V)):
        columns, out = slice(start, stop), aligned_rows(T, stop - start, hidden)
        parts[:, columns] = linear_dlogits(
            hidden, head.rows(columns), labels, stats.lse, out, start
        )
    # A column moves within its tile, which lets the interpreter's GEMM sum in another order.
    assert torch.allclose(whole, parts, rtol=1e-5, atol=0)


def test_nothing_is_written_past_the_vocabulary() -> None:
    """Rows are padded to 16 bytes; a write past the padding would reach the next row."""
    hidden, weight, labels, bias = make(torch.float32)
    padded = torch.full((T + 1, V + 3), 7.0, device=DEVICE)
    _, stats = scaled_softmax_dlogits((hidden, weight, labels, bias), out=padded[:T, :V])
    linear_dlogits(hidden, Head(weight, bias), labels, stats.lse, padded[:T, :V])
    assert (padded[:, V:] == 7).all() and (padded[T] == 7).all()
