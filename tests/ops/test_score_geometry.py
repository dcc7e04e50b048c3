"""Score norms and cosines against scores written out in fp64."""

import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import ops
from fastpref.ops import cpu, score_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The entries of dlogits are rounded twice in each factor of an inner product; sums are fp32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8}
ENDS = [0, 5, 6, 6, 14, 15, 19]  # three pairs; the last chosen response is empty


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(19, 20, generator=draw), torch.randn(101, 20, generator=draw)
    labels = torch.randint(101, (19,), generator=draw)
    labels[7] = -100
    hidden[7] = float("nan")  # an ignored token may hold anything
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE), torch.tensor(ENDS)


def scores(hidden, weight, labels, scale: float, softcap: float | None, c: Tensor) -> Tensor:
    """(6, V, D): the gradient of each response's weighted sum of log-probs."""
    rows = []
    for start, stop in pairwise(ENDS):
        scored = torch.arange(start, stop, device=DEVICE)[labels[start:stop] != -100]
        w = weight.double().requires_grad_()
        x = scale * hidden[scored].double() @ w.T
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        logps = x.log_softmax(1).gather(1, labels[scored][:, None])
        (score,) = torch.autograd.grad(c[scored].double() @ logps[:, 0], w)
        rows.append(score)
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["cpu", "chunked", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
@pytest.mark.parametrize("per_pair", [True, False])
@pytest.mark.parametrize(
    ("scale", "softcap", "weighted"), [(1.0, None, False), (0.5, 5.0, False), (1.0, None, True)]
)
def test_matches_scores_written_out(
    impl, dtype, gram, per_pair, scale, softcap, weighted, monkeypatch
) -> None:
    if impl == "cpu" and (cpu.unavailable_reason(DEVICE) or dtype != torch.float32):
        pytest.skip("impl 'cpu' takes fp32 on a CPU, where it was built")
    monkeypatch.setattr(score_products, "prefers_gram", lambda *sizes: gram)
    monkeypatch.setattr(score_products, "PANEL_BYTES", 48 * 4 * 40)  # three panels
    hidden, weight, labels, ends = make(dtype)
    c = torch.linspace(-0.5, 1.5, len(labels), device=DEVICE)
    got = ops.score_geometry(
        hidden, weight, labels, ends, token_weights=c if weighted else None,
        per_pair=per_pair, logit_scale=scale, softcap=softcap, impl=impl,
    )  # fmt: skip
    c = c if weighted else torch.ones_like(c)
    s = scores(hidden, weight, labels, scale, softcap, c).flatten(1)
    chosen, rejected = s.chunk(2)
    if not per_pair:
        chosen, rejected = chosen.mean(0), rejected.mean(0)
    norms = chosen.norm(dim=-1), rejected.norm(dim=-1)
    cosine = ((chosen * rejected).sum(-1) / (norms[0] * norms[1])).nan_to_num(0.0)
    for value, exact in zip(got, (*norms, cosine), strict=True):
        assert value.shape == exact.shape and value.dtype == torch.float32
        assert ((value - exact).abs() <= TOLERANCE[dtype] * exact.abs().clamp(min=1)).all()


def test_the_cheaper_form_is_taken() -> None:
    """With the sizes of Llama 3 both forms cost the same at 4/3 V D / (V + D) = 5292 tokens."""
    assert score_products.prefers_gram(2640, 2640, 4096, 128256)
    assert not score_products.prefers_gram(2650, 2650, 4096, 128256)


def test_weights_that_do_not_fit_are_named() -> None:
    hidden, weight, labels, ends = make()
    with pytest.raises(ValueError, match=r"token_weights: expected .* shape \(19,\)"):
        ops.score_geometry(hidden, weight, labels, ends, token_weights=torch.ones(18))


@pytest.mark.parametrize("ends", [[0, 9, 20], [0, 9, 5], [-1, 5, 19]])
def test_offsets_that_do_not_fit_are_named(ends) -> None:
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match=r"cu_seqlens: must rise from 0 to 19"):
        ops.score_geometry(hidden, weight, labels, torch.tensor(ends), impl="chunked")
