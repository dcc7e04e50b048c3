"""Token log-probs, differentiable in hidden, weight and bias, for any gradient per token.

    z_t = log softmax(logit_scale * (hidden @ weight.T + bias), soft-capped)_{t, y_t}
    dz_t / dhidden_t = delta_t @ weight        dz / dweight = sum_t g_t delta_t x hidden_t

The direction dz_t / dhidden_t does not know the upstream gradient g, so the forward pass computes
it, chunk by chunk of delta, and the backward pass only scales its rows. Passes over the head (one
is 2 T D V FLOPs): 2 with a frozen head; 3 with a trained one whose delta fits in `cache_bytes`,
else 4, delta being recomputed panel by panel of the vocabulary, so that each row of the weight's
gradient is rounded once and no fp32 copy of it exists.

Extra memory: `chunk_rows` x V in the input dtype, T x D for the direction; with a trained head the
T x V cache instead of the chunk, or a panel of the chunk's size, and T x D of scaled hidden states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .configs import IGNORE_INDEX
from .delta import linear_delta, softmax_delta
from .forward import linear_softmax_fwd
from .launch import aligned_rows, check_inputs, dense_rows, launching_on

CHUNK_BYTES = 256 << 20  # 1024 rows of 128k bf16 columns: full waves in both GEMMs of a chunk
CACHE_BYTES = 2 << 30


class Options(NamedTuple):
    """What is constant in a call."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    cache_bytes: int


def rows_per_chunk(width: int, element_size: int) -> int:
    """Rows of this width in CHUNK_BYTES, a multiple of 128 so that no GEMM tile is cut."""
    return max(128, CHUNK_BYTES // (max(width, 1) * element_size) // 128 * 128)


class LinearLogps(torch.autograd.Function):
    """Log-probs forward, row scaling and at most one GEMM per pass backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (T,)
        options: Options,
    ) -> Tensor:
        hidden, weight = dense_rows(hidden), dense_rows(weight)
        T, V = hidden.shape[0], weight.shape[0]
        scale, softcap = options.logit_scale, options.softcap
        body, head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        cached = head and T * V * hidden.element_size() <= options.cache_bytes
        ctx.options, ctx.cached = options, cached
        direction = torch.empty_like(hidden) if body else None

        if body or cached:
            rows = options.chunk_rows
            buffer = aligned_rows(T if cached else min(rows, T), V, hidden)
            logps = torch.empty(T, dtype=torch.float32, device=hidden.device)
            lse = torch.empty_like(logps)
            for start in range(0, T, rows):
                part = slice(start, min(start + rows, T))
                delta = buffer[part] if cached else buffer[: part.stop - start]
                stats = softmax_delta(
                    hidden[part], weight, labels[part], bias, scale, softcap, delta
                )
                logps[part], lse[part] = stats.logps, stats.lse
                if direction is not None:
                    torch.mm(delta, weight, out=direction[part])
        else:
            stats = linear_softmax_fwd(hidden, weight, labels, bias, scale, softcap, full=False)
            logps, lse = stats.logps, stats.lse

        ctx.save_for_backward(
            direction,
            hidden if head else None,
            buffer if cached else None,
            labels if head else None,
            *((weight, bias, lse) if head and not cached else (None,) * 3),
        )
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        direction, hidden, delta, labels, weight, bias, lse = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = scale_rows(direction, grad) if needs_hidden else None
        if not (needs_weight or needs_bias):
            return grad_hidden, None, None, None, None
        # A row left out may hold NaN, which a zero in delta would not silence.
        scaled = scale_rows(hidden, grad).masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)

        def recompute(part: slice, panel: Tensor) -> Tensor:
            return linear_delta(
                hidden, weight[part], labels, None if bias is None else bias[part],
                ctx.options.logit_scale, ctx.options.softcap, lse, panel, part.start,
            )  # fmt: skip

        with launching_on(grad):
            if ctx.cached:
                grad_weight = delta.t() @ scaled if needs_weight else None
                grad_bias = column_sums(delta, grad) if needs_bias else None
            else:
                grad_weight, grad_bias = head_gradients(
                    scaled, grad, weight.shape[0], recompute, needs_weight, needs_bias
                )
        return grad_hidden, grad_weight, grad_bias, None, None


def head_gradients(
    scaled: Tensor,  # (T, D), hidden states times the upstream gradient
    grad: Tensor,  # (T,) the upstream gradient
    V: int,
    recompute: Callable[[slice, Tensor], Tensor],  # fills (T, columns) of delta for some columns
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias over panels of the vocabulary, each entry rounded once."""
    T, D = scaled.shape
    grad_weight = scaled.new_empty((V, D)) if needs_weight else None
    grad_bias = scaled.new_empty(V) if needs_bias else None
    columns = rows_per_chunk(T, scaled.element_size())
    for start in range(0, V, columns):
        part = slice(start, min(start + columns, V))
        delta = recompute(part, aligned_rows(T, part.stop - start, scaled))
        if grad_weight is not None:
            torch.mm(delta.t(), scaled, out=grad_weight[part])
        if grad_bias is not None:
            grad_bias[part] = column_sums(delta, grad)
    return grad_weight, grad_bias


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """factors[:, None] * x, multiplied in fp32 and rounded once to x's dtype."""
    return torch.mul(x, factors[:, None], out=torch.empty_like(x))


def column_sums(delta: Tensor, grad: Tensor) -> Tensor:
    """sum_t grad_t delta_t, accumulated in fp32, in delta's dtype."""
    return (grad[None].to(delta.dtype) @ delta)[0]


def linear_logps(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Tensor:  # (T,)
    """Log-prob of each label in nats, fp32, differentiable once in hidden, weight and bias.

    hidden, weight and bias are bf16, fp16 or fp32, of one dtype; labels are int64 in [0, V), or
    -100 for rows whose log-prob and gradient are 0. Such rows still cost what others cost: leave
    them out. chunk_rows bounds the rows of delta alive at a time (default: 256 MiB of them),
    cache_bytes the delta kept for the gradient of the head. Without a gradient to compute, or with
    one only for a head too large to cache, nothing of size rows x V is written.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_inputs(hidden, weight, labels, bias, softcap)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1 or None, got {chunk_rows}")
    with launching_on(hidden):
        inputs = (x for x in (hidden, weight, bias) if x is not None)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            return linear_softmax_fwd(
                hidden, weight, labels, bias, logit_scale, softcap, full=False
            ).logps
        rows = chunk_rows or rows_per_chunk(weight.shape[0], hidden.element_size())
        options = Options(logit_scale, softcap, rows, cache_bytes)
        logps: Tensor = LinearLogps.apply(hidden, weight, bias, labels, options)
        return logps
