"""Norms of the chosen and the rejected score of the head, and the cosine between them.

    s = sum_t dz_t / dweight = delta^T hidden, (V, D), over the tokens t of a response
    <s_a, s_b> = sum_{t in a, u in b} (delta_t . delta_u) (hidden_t . hidden_u)

s is never written. The Gram form multiplies two (tokens, tokens) matrices entry by entry; the
direct form squares s panel by panel of the vocabulary. For n and m tokens they cost, beyond the
pass that computes delta, 2 (n^2 + m^2 + n m) (V + D) and 2 (n + m) V D FLOPs, and the cheaper one
is taken: with n = m, Gram up to n + m = 4/3 V D / (V + D) tokens.

Extra memory: a panel of delta, and n^2 + m^2 + n m fp32 numbers or an fp32 (columns, D) pair.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .configs import IGNORE_INDEX
from .delta import linear_delta
from .forward import linear_softmax_fwd
from .launch import aligned_rows, check_inputs, dense_rows, launching_on
from .linear_logps import rows_per_chunk


class ScoreGeometry(NamedTuple):
    """fp32, () for the batch-mean scores, (B,) per pair; a cosine with a zero score is 0."""

    chosen_norm: Tensor
    rejected_norm: Tensor
    cosine: Tensor


def prefers_gram(n: int, m: int, D: int, V: int) -> bool:
    """Whether the Gram form costs fewer FLOPs for n chosen and m rejected tokens."""
    return (n * n + m * m + n * m) * (V + D) <= (n + m) * V * D


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 results, not only fp32 sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def score_products(
    hidden: Tensor,  # (n + m, D), chosen tokens first
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (n + m,)
    lse: Tensor,  # (n + m,)
    n: int,
    logit_scale: float,
    softcap: float | None,
    gram: bool,
) -> Tensor:  # (3,)
    """<s_w, s_w>, <s_l, s_l> and <s_w, s_l>, in fp32."""
    T, V = hidden.shape[0], weight.shape[0]
    sides = (slice(0, n), slice(n, T))
    pairs = ((sides[0], sides[0]), (sides[1], sides[1]), sides)
    columns = rows_per_chunk(max(T, 2 * hidden.shape[1]), hidden.element_size())
    grams: list[Tensor] = []
    products = torch.zeros(3, dtype=torch.float32, device=hidden.device)
    for start in range(0, V, columns):
        part = weight[start : start + columns]
        delta = linear_delta(
            hidden, part, labels, None, logit_scale, softcap, lse,
            aligned_rows(T, part.shape[0], hidden), start,
        )  # fmt: skip
        if gram:
            blocks = [matmul_fp32(delta[a], delta[b].t()) for a, b in pairs]
            grams = [x + y for x, y in zip(grams, blocks, strict=True)] if grams else blocks
        else:
            scores = [matmul_fp32(delta[side].t(), hidden[side]) for side in sides]
            chosen, rejected = scores
            products += torch.stack(
                [chosen.square().sum(), rejected.square().sum(), (chosen * rejected).sum()]
            )
    if gram:
        hiddens = [matmul_fp32(hidden[a], hidden[b].t()) for a, b in pairs]
        products = torch.stack([(x * y).sum() for x, y in zip(grams, hiddens, strict=True)])
    return products


@torch.no_grad()
def score_geometry(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (2B + 1,): chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}
    *,
    per_pair: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> ScoreGeometry:
    """Norms and cosine of the chosen and rejected scores with respect to the head's weight.

    Of the mean over the batch's pairs, or, with per_pair, of each pair. hidden and weight are bf16,
    fp16 or fp32; labels are int64, -100 contributing nothing. Keep cu_seqlens on the CPU: the
    sizes of the products come from it, and reading it from a GPU waits for that GPU.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_inputs(hidden, weight, labels, None, softcap)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 3 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens must be (2B + 1,) with B > 0 chosen and as many rejected sequences, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != hidden.shape[0] or sorted(ends) != ends:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {hidden.shape[0]}, got {ends[0]} to {ends[-1]}"
        )
    B = len(ends) // 2
    groups = [(0, ends[B], ends[B], ends[2 * B])]
    if per_pair:
        groups = [(ends[i], ends[i + 1], ends[B + i], ends[B + i + 1]) for i in range(B)]
    with launching_on(hidden):
        # A token left out may hold NaN, which a zero in delta would not silence.
        hidden = dense_rows(hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0.0))
        weight = dense_rows(weight)
        lse = linear_softmax_fwd(hidden, weight, labels, None, logit_scale, softcap, full=False).lse
        rows = []
        for a, b, c, d in groups:
            h, y, z = (torch.cat([x[a:b], x[c:d]]) for x in (hidden, labels, lse))
            gram = prefers_gram(b - a, d - c, hidden.shape[1], weight.shape[0])
            rows.append(score_products(h, weight, y, z, b - a, logit_scale, softcap, gram))
        chosen, rejected, product = torch.stack(rows).unbind(1)
    # A norm that rounding would take below 0 is 0.
    chosen, rejected = chosen.clamp(min=0).sqrt(), rejected.clamp(min=0).sqrt()
    size = chosen * rejected
    cosine = torch.where(size > 0, product / size.clamp(min=1e-38), 0.0).clamp(-1, 1)
    if per_pair:
        return ScoreGeometry(chosen, rejected, cosine)
    return ScoreGeometry(chosen[0] / B, rejected[0] / B, cosine[0])
