"""Inner products of two sequences' scores, without ever holding a score.

    s = sum_t c_t d logps[t] / d weight = dlogits^T (c hidden), (V, D), over a sequence's tokens
    <s_a, s_b> = sum_{t in a, u in b} (dlogits_t . dlogits_u) (c_t hidden_t . c_u hidden_u)

The Gram form multiplies two (tokens, tokens) matrices entry by entry; the direct form squares s one
panel of the vocabulary at a time. For n and m tokens they cost, in addition to the GEMM that
computes dlogits, 2 (n^2 + m^2 + n m) (V + D) and 2 (n + m) V D FLOPs, and the cheaper one is used:
with n = m, Gram up to n + m = 4/3 V D / (V + D) tokens.

Extra memory: a panel of dlogits, and 2 (n^2 + m^2 + n m) fp32 numbers or an fp32 (columns, D) pair.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastpref.ops.backend import Backend, Head
from fastpref.ops.reference import statistics_dtype

PANEL_BYTES = 256 * 2**20


def score_products(
    backend: Backend,
    hidden: Tensor,  # (T, D), 0 where ignored
    head: Head,
    labels: Tensor,  # (T,)
    lse: Tensor,  # (T,)
    token_weights: Tensor | None,  # (T,) c; None means 1
    groups: Sequence[tuple[slice, slice]],  # tokens of two sequences a and b
) -> Tensor:  # (groups, 3)
    """<s_a, s_a>, <s_b, s_b> and <s_a, s_b> of each group, in fp32 (fp64 for fp64 inputs)."""
    vocabulary = len(head.weight)
    results = []
    for a, b in groups:
        h, y, z = (torch.cat([x[a], x[b]]) for x in (hidden, labels, lse))
        rows = h
        if token_weights is not None:
            c = torch.cat([token_weights[a], token_weights[b]]).to(lse.dtype)
            rows = (c[:, None] * h).to(h.dtype)
        n, m = a.stop - a.start, b.stop - b.start
        width = max(1, PANEL_BYTES // (4 * max(n + m, 2 * h.shape[1])))
        panels = (
            backend.dlogits_panel(h, head, y, z, slice(v, min(v + width, vocabulary)))
            for v in range(0, vocabulary, width)
        )
        form = _gram if prefers_gram(n, m, h.shape[1], vocabulary) else _direct
        results.append(form(rows, (slice(0, n), slice(n, n + m)), panels))
    return torch.stack(results)


def prefers_gram(n: int, m: int, D: int, V: int) -> bool:
    """Whether the Gram form costs fewer FLOPs for n and m tokens."""
    return (n * n + m * m + n * m) * (V + D) <= (n + m) * V * D


def _gram(hidden: Tensor, sides: tuple[slice, slice], panels: Iterable[Tensor]) -> Tensor:
    a, b = sides
    pairs = ((a, a), (b, b), (a, b))
    grams = [_matmul(hidden[x], hidden[y].T) for x, y in pairs]
    sums = [torch.zeros_like(gram) for gram in grams]
    for dlogits in panels:
        for total, (x, y) in zip(sums, pairs, strict=True):
            total += _matmul(dlogits[x], dlogits[y].T)
        # Freed before the next panel is allocated.
        del dlogits
    return torch.stack([(x * y).sum() for x, y in zip(sums, grams, strict=True)])


def _direct(hidden: Tensor, sides: tuple[slice, slice], panels: Iterable[Tensor]) -> Tensor:
    total = hidden.new_zeros(3, dtype=statistics_dtype(hidden))
    for dlogits in panels:
        s_a, s_b = (_matmul(dlogits[side].T, hidden[side]) for side in sides)
        total += torch.stack([s_a.square().sum(), s_b.square().sum(), (s_a * s_b).sum()])
        del dlogits
    return total


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 results, not only fp32 sums."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) @ b.to(dtype)
