"""Inner products of two sequences' scores, without ever holding a score.

    s = sum_t c_t dz_t / dweight = delta^T (c hidden), (V, D), over the tokens t of a sequence
    <s_a, s_b> = sum_{t in a, u in b} (delta_t . delta_u) (c_t hidden_t . c_u hidden_u)

The Gram form multiplies two (tokens, tokens) matrices entry by entry; the direct form squares s a
panel of the vocabulary at a time. For n and m tokens they cost, beyond the pass that computes
delta, 2 (n^2 + m^2 + n m) (V + D) and 2 (n + m) V D FLOPs, and the cheaper one is taken: with
n = m, Gram up to n + m = 4/3 V D / (V + D) tokens.

Extra memory: a panel of delta, and 2 (n^2 + m^2 + n m) fp32 numbers or an fp32 (columns, D) pair.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastpref.ops.reference import statistics_dtype

PANEL_BYTES = 256 * 2**20


def score_products(
    hidden: Tensor,  # (T, D), 0 where ignored
    labels: Tensor,  # (T,)
    lse: Tensor,  # (T,)
    token_weights: Tensor | None,  # (T,) c; None means 1
    vocabulary: int,
    groups: Sequence[tuple[slice, slice]],  # tokens of two sequences a and b
    delta: Callable[[Tensor, Tensor, Tensor, slice], Tensor],  # (n, D), (n,), (n,), panel -> (n, V)
) -> Tensor:  # (groups, 3)
    """<s_a, s_a>, <s_b, s_b> and <s_a, s_b> of each group, in fp32 (fp64 for fp64 inputs)."""
    found = []
    for a, b in groups:
        h, y, z = (torch.cat([x[a], x[b]]) for x in (hidden, labels, lse))
        rows = h
        if token_weights is not None:
            c = torch.cat([token_weights[a], token_weights[b]]).to(lse.dtype)
            rows = (c[:, None] * h).to(h.dtype)
        n, m = a.stop - a.start, b.stop - b.start
        width = max(1, PANEL_BYTES // (4 * max(n + m, 2 * h.shape[1])))
        deltas = (
            delta(h, y, z, slice(v, min(v + width, vocabulary)))
            for v in range(0, vocabulary, width)
        )
        form = _gram if prefers_gram(n, m, h.shape[1], vocabulary) else _direct
        found.append(form(rows, (slice(0, n), slice(n, n + m)), deltas))
    return torch.stack(found)


def prefers_gram(n: int, m: int, D: int, V: int) -> bool:
    """Whether the Gram form costs fewer FLOPs for n and m tokens."""
    return (n * n + m * m + n * m) * (V + D) <= (n + m) * V * D


def _gram(hidden: Tensor, sides: tuple[slice, slice], deltas: Iterable[Tensor]) -> Tensor:
    a, b = sides
    pairs = ((a, a), (b, b), (a, b))
    grams = [_product(hidden[x], hidden[y].T) for x, y in pairs]
    sums = [torch.zeros_like(gram) for gram in grams]
    for delta in deltas:
        for total, (x, y) in zip(sums, pairs, strict=True):
            total += _product(delta[x], delta[y].T)
        del delta  # before the next one is made
    return torch.stack([(x * y).sum() for x, y in zip(sums, grams, strict=True)])


def _direct(hidden: Tensor, sides: tuple[slice, slice], deltas: Iterable[Tensor]) -> Tensor:
    total = hidden.new_zeros(3, dtype=statistics_dtype(hidden))
    for delta in deltas:
        s_a, s_b = (_product(delta[side].T, hidden[side]) for side in sides)
        total += torch.stack([s_a.square().sum(), s_b.square().sum(), (s_a * s_b).sum()])
        del delta
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 results, not only fp32 sums."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) @ b.to(dtype)
