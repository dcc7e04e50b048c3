"""Token log-probs, and what their gradients in hidden, weight and bias are made of.

    z_t = log softmax(logit_scale * (hidden @ weight.T + bias), soft-capped)_{t, y_t}
    direction_t = dz_t / dhidden_t = delta_t @ weight
    dweight = sum_t g_t delta_t x hidden_t        g the upstream gradient, any value per token

The direction does not know the upstream gradient, so the forward pass computes it, chunk by chunk
of delta, and all that is left to do backward is to scale its rows. Passes over the head (one is
2 T D V FLOPs): 2 with a frozen head; 3 with a trained one whose delta fits in CACHE_BYTES, else 4,
delta being recomputed panel by panel of the vocabulary, so that each row of the weight's gradient
is rounded once and no fp32 copy of it exists.

Extra memory: CHUNK_BYTES of delta, T x D for the direction; with a trained head the T x V cache
instead of the chunk, or a panel of the chunk's size, and T x D of scaled hidden states.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref_kernels.common.configs import IGNORE_INDEX
from fastpref_kernels.common.launch import aligned_rows, dense_rows, launching_on
from fastpref_kernels.dlogits import linear_delta, softmax_delta
from fastpref_kernels.softmax_stats import linear_softmax_fwd

CHUNK_BYTES = 256 << 20  # 1024 rows of 128k bf16 columns: full waves in both GEMMs of a chunk
CACHE_BYTES = 2 << 30


def kept_deltas(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
) -> Tensor | None:  # (T, V)
    """Room for delta between forward and backward if it fits in CACHE_BYTES."""
    T, V = hidden.shape[0], weight.shape[0]
    fits = T * V * hidden.element_size() <= CACHE_BYTES
    return aligned_rows(T, V, hidden) if fits else None


def linear_logps_fwd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    logps: Tensor,  # (T,), written
    lse: Tensor,  # (T,), written
    direction: Tensor | None,  # (T, D), written
    deltas: Tensor | None,  # (T, V), rows of unit stride, written
) -> None:
    """Log-probs and log-sum-exps; nothing of size rows x V where they alone are wanted.

    Of deltas that are kept, row t is delta_t but for a factor, which is left in lse[t].
    """
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    T, V = hidden.shape[0], weight.shape[0]
    with launching_on(hidden):
        if direction is None and deltas is None:
            stats = linear_softmax_fwd(
                hidden, weight, labels, bias, logit_scale, softcap, full=False
            )
            logps.copy_(stats.logps)
            lse.copy_(stats.lse)
            return
        rows = rows_per_chunk(V, hidden.element_size())
        buffer = aligned_rows(min(rows, T), V, hidden) if deltas is None else deltas
        factor = torch.empty_like(lse)
        for start in range(0, T, rows):
            part = slice(start, min(start + rows, T))
            delta = buffer[: part.stop - start] if deltas is None else deltas[part]
            stats = softmax_delta(
                hidden[part], weight, labels[part], bias, logit_scale, softcap, delta, factor[part]
            )
            logps[part], lse[part] = stats.logps, stats.lse
            if direction is not None:
                torch.mm(delta, weight, out=direction[part])
        if direction is not None:
            torch.mul(direction, factor[:, None], out=direction)
        if deltas is not None:
            lse.copy_(factor)


def linear_logps_bwd(
    gain: Tensor,  # (T,) the upstream gradient, 0 where ignored
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,  # (T,) and
    deltas: Tensor | None,  # (T, V) as the forward pass left them
    grad_weight: Tensor | None,  # (V, D), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    """Gradients of a trained head, from deltas kept or made again."""
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    gain = gain if deltas is None else gain * lse
    # An ignored row may hold NaN, which a gain of zero would not silence.
    scaled = scale_rows(hidden, gain).masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)

    def recompute(part: slice, panel: Tensor) -> Tensor:
        return linear_delta(
            hidden, weight[part], labels, None if bias is None else bias[part], logit_scale,
            softcap, lse, panel, part.start,
        )  # fmt: skip

    with launching_on(hidden):
        if deltas is None:
            head_gradients(scaled, gain, weight.shape[0], recompute, grad_weight, grad_bias)
            return
        if grad_weight is not None:
            torch.mm(deltas.t(), scaled, out=grad_weight)
        if grad_bias is not None:
            grad_bias.copy_(column_sums(deltas, gain))


def head_gradients(
    scaled: Tensor,  # (T, D), hidden states times the upstream gradient
    gain: Tensor,  # (T,) the upstream gradient
    V: int,
    recompute: Callable[[slice, Tensor], Tensor],  # fills (T, columns) of delta for some columns
    grad_weight: Tensor | None,  # (V, D), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    """Gradients of weight and bias over panels of the vocabulary, each entry rounded once."""
    T = scaled.shape[0]
    columns = min(rows_per_chunk(T, scaled.element_size()), V)
    buffer = aligned_rows(T, columns, scaled)  # made once: a new one would meet the one before
    for start in range(0, V, columns):
        part = slice(start, min(start + columns, V))
        delta = recompute(part, buffer[:, : part.stop - start])
        if grad_weight is not None:
            torch.mm(delta.t(), scaled, out=grad_weight[part])
        if grad_bias is not None:
            grad_bias[part] = column_sums(delta, gain)


def rows_per_chunk(width: int, element_size: int) -> int:
    """About as many rows of this width as CHUNK_BYTES hold, in 128s so that no GEMM tile is cut."""
    return max(1, round(CHUNK_BYTES / (max(width, 1) * element_size * 128))) * 128


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """factors[:, None] * x, multiplied in fp32 and rounded once to x's dtype."""
    return torch.mul(x, factors[:, None], out=torch.empty_like(x))


def column_sums(delta: Tensor, gain: Tensor) -> Tensor:
    """sum_t gain_t delta_t, accumulated in fp32, in delta's dtype."""
    return (gain[None].to(delta.dtype) @ delta)[0]
