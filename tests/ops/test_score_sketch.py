"""Sums of scores from the forward pass, and their sketches, against scores written out in fp64."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import ops
from fastpref.ops import chunked, cpu
from fastpref.ops.score_sketch import sketch_signs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH, VOCABULARY, FIRST_REJECTED = 19, 20, 101, 8
# An entry of dlogits and one of hidden are rounded to the dtype; sums are fp32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8}


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    labels[7] = labels[8] = -100
    hidden[7] = float("nan")  # an ignored token may hold anything
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def scores(
    inputs: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, scale: float, softcap: float | None,
    c: Tensor,
) -> Tensor:  # fmt: skip
    """(2, V, D): gradients of the weighted sums of the chosen and of the rejected log-probs."""
    hidden, weight, labels = inputs
    w = weight.double().requires_grad_()
    sums = []
    for side in (slice(0, FIRST_REJECTED), slice(FIRST_REJECTED, TOKENS)):
        scored = torch.arange(TOKENS, device=DEVICE)[side][labels[side] != -100]
        x = hidden[scored].double() @ w.T
        x = scale * (x if bias is None else x + bias.double())
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        logps = x.log_softmax(1).gather(1, labels[scored][:, None])
        sums.append(torch.autograd.grad(c[scored].double() @ logps[:, 0], w)[0])
    return torch.stack(sums)


def skip_unless_available(impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and (cpu.unavailable_reason(DEVICE) or dtype != torch.float32):
        pytest.skip("impl 'cpu' takes fp32 on a CPU, where it was built")
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no fp64")


@pytest.mark.parametrize("impl", ["reference", "cpu", "chunked", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize(
    ("scale", "softcap", "biased", "weighted"),
    [(1.0, None, False, False), (0.5, 5.0, True, False), (1.0, None, False, True)],
)
def test_sums_are_the_folded_scores(
    impl, dtype, rows, scale, softcap, biased, weighted, monkeypatch
) -> None:
    skip_unless_available(impl, dtype)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * VOCABULARY * 5)  # chunks of 5 tokens: 4 of them
    inputs = make(dtype)
    bias = torch.linspace(-1, 1, VOCABULARY, device=DEVICE).to(dtype) if biased else None
    c = torch.linspace(-0.5, 1.5, TOKENS, device=DEVICE)
    _, sums = ops.linear_logps_and_scores(
        *inputs, FIRST_REJECTED, token_weights=c if weighted else None, rows=rows, bias=bias,
        logit_scale=scale, softcap=softcap, impl=impl,
    )  # fmt: skip
    exact = scores(inputs, bias, scale, softcap, c if weighted else torch.ones_like(c))
    if rows is not None:
        signs = sketch_signs(VOCABULARY, rows, exact.device, torch.float64).flatten()
        folded = exact.new_zeros(2, rows, WIDTH)
        for v in range(VOCABULARY):
            folded[:, v % rows] += signs[v] * exact[:, v]
        exact = folded
    assert sums.shape == exact.shape and not sums.requires_grad
    assert (sums - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("impl", ["cpu", "chunked", "triton"])
@pytest.mark.parametrize("trained", ["hidden", "both", "none"])
def test_log_probs_and_gradients_are_those_without_sums_in_every_bit(impl, trained) -> None:
    skip_unless_available(impl, torch.float32)
    results = []
    for with_sums in (False, True):
        hidden, weight, labels = make()
        hidden.requires_grad_(trained != "none")
        weight.requires_grad_(trained == "both")
        if with_sums:
            logps, _ = ops.linear_logps_and_scores(
                hidden, weight, labels, FIRST_REJECTED, rows=16, impl=impl
            )
        else:
            logps = ops.linear_logps(hidden, weight, labels, impl=impl)
        if trained != "none":
            (logps * torch.linspace(-1, 1, TOKENS, device=DEVICE)).sum().backward()
        results.append((logps, hidden.grad, weight.grad))
    for plain, ours in zip(*results, strict=True):
        assert (plain is None) == (ours is None)
        assert plain is None or torch.equal(plain, ours)


def test_a_sketch_with_a_row_for_each_entry_is_exact() -> None:
    inputs = make(torch.float64)
    exact, sketch = (
        ops.linear_logps_and_scores(*inputs, FIRST_REJECTED, rows=rows)[1]
        for rows in (None, VOCABULARY + 1)
    )
    assert torch.equal(sketch, exact)


def test_sums_of_micro_batches_add_up() -> None:
    hidden, weight, labels = make(torch.float64)
    _, whole = ops.linear_logps_and_scores(hidden, weight, labels, FIRST_REJECTED, rows=16)
    parts = torch.zeros_like(whole)
    for chosen, rejected in ((range(3), range(8, 12)), (range(3, 8), range(12, 19))):
        tokens = [*chosen, *rejected]
        parts += ops.linear_logps_and_scores(
            hidden[tokens], weight, labels[tokens], len(chosen), rows=16
        )[1]
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)


def test_the_geometry_is_that_of_the_mean_scores() -> None:
    inputs = make(torch.float64)
    c = torch.ones(TOKENS, device=DEVICE)
    chosen, rejected = scores(inputs, None, 1.0, None, c).flatten(1) / 3
    _, sums = ops.linear_logps_and_scores(*inputs, FIRST_REJECTED, rows=None)
    geometry = ops.batch_geometry(sums, pairs=3)
    expected = chosen.norm(), rejected.norm(), chosen @ rejected / chosen.norm() / rejected.norm()
    for value, exact in zip(geometry, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-13, atol=0)
    nothing = ops.batch_geometry(torch.zeros(2, 4, 5), pairs=1)
    assert [x.item() for x in nothing] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_error_of_a_sketch_is_within_its_standard_deviation(seed) -> None:
    """Four standard deviations of the docstring's bound; without signs the error is far larger."""
    rows, draw = 64, torch.Generator().manual_seed(seed)
    common = torch.randn(1, 6, generator=draw, dtype=torch.float64)
    a, b = common + torch.randn(2, 2000, 6, generator=draw, dtype=torch.float64)
    signs = sketch_signs(2000, rows, a.device, a.dtype).flatten()[:2000, None]

    def error(sign: Tensor | float) -> float:
        buckets = torch.arange(2000) % rows
        x, y = (a.new_zeros(rows, 6).index_add_(0, buckets, sign * s) for s in (a, b))
        return abs(((x * y).sum() - (a * b).sum()).item())

    bound = ((a.norm() * b.norm()) ** 2 + (a * b).sum() ** 2) / rows
    assert error(signs) <= 4 * bound.sqrt()
    assert error(1.0) > 4 * bound.sqrt()


def test_bad_arguments_are_named() -> None:
    inputs = make()
    with pytest.raises(ValueError, match=r"first_rejected: expected a number of tokens from 0"):
        ops.linear_logps_and_scores(*inputs, TOKENS + 1)
    with pytest.raises(ValueError, match=r"rows: must be >= 1, or None for exact sums, got 0"):
        ops.linear_logps_and_scores(*inputs, 3, rows=0)
    with pytest.raises(ValueError, match=r"token_weights: expected .* shape \(19,\)"):
        ops.linear_logps_and_scores(*inputs, 3, token_weights=torch.ones(18))


def test_the_graph_stays_whole() -> None:
    hidden, weight, labels = make()

    def step(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, sums = ops.linear_logps_and_scores(hidden, weight, labels, FIRST_REJECTED, rows=16)
        return logps.sum(), sums.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(hidden), step(hidden), strict=True):
        torch.testing.assert_close(got, expected)
