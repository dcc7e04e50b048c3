"""Token log-probs, and the parts of their gradients in hidden, weight and bias.

    logps_t = log softmax(logit_scale * (hidden @ weight.T + bias), soft-capped)_{t, y_t}
    dlogp_dhidden_t = d logps_t / d hidden_t = dlogits_t @ weight
    grad_weight = sum_t g_t dlogits_t x hidden_t        g the upstream gradient, any value per token

`dlogp_dhidden` does not depend on the upstream gradient, so the forward pass computes it, one chunk
of dlogits at a time; the backward pass only scales its rows. GEMMs over the head (2 T D V FLOPs
each): 2 with a frozen head; 3 with a trained one whose dlogits fit in CACHE_BYTES, else 4. Without
the cache dlogits are recomputed one panel of the vocabulary at a time, so that each row of the
weight's gradient is rounded once and no fp32 copy of it exists.

Extra memory: CHUNK_BYTES of dlogits, and T x D for dlogp_dhidden. With a trained head the T x V
cache, or a panel of the chunk's size, replaces the chunk, and scaled hidden states take T x D.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpref_kernels.common.configs import IGNORE_INDEX
from fastpref_kernels.common.launch import aligned_rows, dense_rows, launching_on
from fastpref_kernels.dlogits import linear_dlogits, softmax_dlogits
from fastpref_kernels.score_sketch import add_scores
from fastpref_kernels.softmax_stats import linear_softmax_fwd

if TYPE_CHECKING:
    from fastpref.ops.backend import Head, ScoreSketch

CHUNK_BYTES = 256 << 20  # 1024 rows of 128k bf16 columns: full waves in both GEMMs of a chunk
CACHE_BYTES = 2 << 30


def new_dlogits_cache(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
) -> Tensor | None:  # (T, V)
    """Uninitialized dlogits, kept from forward to backward, if they fit in CACHE_BYTES."""
    T, V = hidden.shape[0], weight.shape[0]
    fits = T * V * hidden.element_size() <= CACHE_BYTES
    return aligned_rows(T, V, hidden) if fits else None


def linear_logps_fwd(
    hidden: Tensor,  # (T, D)
    head: "Head",
    labels: Tensor,  # (T,)
    logps: Tensor,  # (T,), written
    lse: Tensor,  # (T,), written
    dlogp_dhidden: Tensor | None,  # (T, D), written
    dlogits: Tensor | None,  # (T, V), rows of unit stride, written
    row_scale: Tensor | None,  # (T,), written; None without dlogits
    sketch: "ScoreSketch | None" = None,  # its sums are written
) -> None:
    """Log-probs, log-sum-exps, the requested inputs of the backward pass, and sums of scores.

    The gradient by the raw logits of token t is row_scale[t] * dlogits[t]. Log-probs alone allocate
    nothing of size (rows, V).
    """
    hidden, head = dense_rows(hidden), head._replace(weight=dense_rows(head.weight))
    T, V = hidden.shape[0], head.weight.shape[0]
    with launching_on(hidden):
        if dlogp_dhidden is None and dlogits is None and sketch is None:
            stats = linear_softmax_fwd(hidden, head, labels, full=False)
            logps.copy_(stats.logps)
            lse.copy_(stats.lse)
            return
        rows = rows_per_chunk(V, hidden.element_size())
        buffer = aligned_rows(min(rows, T), V, hidden) if dlogits is None else dlogits
        scale = torch.empty_like(lse) if row_scale is None else row_scale
        if sketch is not None:
            sketch.sums.zero_()
        for start in range(0, T, rows):
            part = slice(start, min(start + rows, T))
            chunk = buffer[: part.stop - start] if dlogits is None else dlogits[part]
            stats = softmax_dlogits(hidden[part], head, labels[part], chunk, scale[part])
            logps[part], lse[part] = stats.logps, stats.lse
            if dlogp_dhidden is not None:
                torch.mm(chunk, head.weight, out=dlogp_dhidden[part])
            if sketch is not None:
                add_scores(sketch, chunk, scale, hidden, labels, part)
        if dlogp_dhidden is not None:
            torch.mul(dlogp_dhidden, scale[:, None], out=dlogp_dhidden)


def linear_logps_bwd(
    grad_logps: Tensor,  # (T,) upstream gradient, 0 where ignored
    hidden: Tensor,  # (T, D)
    head: "Head",
    labels: Tensor,  # (T,)
    lse: Tensor,  # (T,) of the forward pass
    dlogits: Tensor | None,  # (T, V) of the forward pass; None: recompute them
    row_scale: Tensor | None,  # (T,) of the forward pass
    grad_weight: Tensor | None,  # (V, D), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    """Gradients of a trained head, from cached or recomputed dlogits."""
    hidden, head = dense_rows(hidden), head._replace(weight=dense_rows(head.weight))
    scale = grad_logps if row_scale is None else grad_logps * row_scale
    # An ignored row may hold NaN, and 0 times NaN is NaN.
    scaled_hidden = scale_rows(hidden, scale).masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)

    def recompute(columns: slice, panel: Tensor) -> Tensor:
        return linear_dlogits(hidden, head.rows(columns), labels, lse, panel, columns.start)

    with launching_on(hidden):
        if dlogits is None:
            V = head.weight.shape[0]
            head_gradients(scaled_hidden, scale, V, recompute, grad_weight, grad_bias)
            return
        if grad_weight is not None:
            multiply_into(grad_weight, dlogits.t(), scaled_hidden)
        if grad_bias is not None:
            weighted_column_sums(dlogits, scale, grad_bias)


def head_gradients(
    scaled_hidden: Tensor,  # (T, D), hidden states times the upstream gradient
    upstream: Tensor,  # (T,)
    V: int,
    recompute: Callable[[slice, Tensor], Tensor],  # fills some columns of dlogits (T, columns)
    grad_weight: Tensor | None,  # (V, D), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    """Gradients of weight and bias, one panel of the vocabulary at a time, each rounded once."""
    T = scaled_hidden.shape[0]
    width = min(rows_per_chunk(T, scaled_hidden.element_size()), V)
    # Allocated once: a new buffer per panel would keep two alive.
    buffer = aligned_rows(T, width, scaled_hidden)
    for start in range(0, V, width):
        columns = slice(start, min(start + width, V))
        dlogits = recompute(columns, buffer[:, : columns.stop - start])
        if grad_weight is not None:
            multiply_into(grad_weight[columns], dlogits.t(), scaled_hidden)
        if grad_bias is not None:
            weighted_column_sums(dlogits, upstream, grad_bias[columns])


def rows_per_chunk(width: int, element_size: int, budget: int = CHUNK_BYTES) -> int:
    """Number of rows of this width in about `budget` bytes, in 128s so that no GEMM tile is cut."""
    return max(1, round(budget / (max(width, 1) * element_size * 128))) * 128


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """scale[:, None] * x, multiplied in fp32 and rounded once to x's dtype."""
    return torch.mul(x, scale[:, None], out=torch.empty_like(x))


def weighted_column_sums(dlogits: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = sum_t weights_t dlogits_t, accumulated in fp32 and rounded once."""
    multiply_into(out[None], weights[None].to(dlogits.dtype), dlogits)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in fp32 and rounded once to the dtype of out, which may be wider."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
