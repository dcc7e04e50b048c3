"""delta = d logps / d (hidden @ weight.T): the score of a token with respect to its own products.

    delta_tv = (onehot(y_t)_v - p_tv) * logit_scale * (1 - (x_tv / softcap)^2)

and 0 in rows labelled -100. Two ways to it, both from fp32 logits that are never written:

- `softmax_delta`, one GEMM: the statistics pass leaves e^(x - shift) behind, which is delta but for
  a factor of each row and the entry of its label, and the kernel that merges the statistics, which
  knows the log-sum-exp, writes both. Rounded once to the input dtype.
- `linear_delta`, one GEMM, for any columns of the vocabulary once the log-sum-exp is known: the
  recomputation. Rounded once.

The shift is the label's own logit plus SHIFT: any number within RANGE of the log-sum-exp does.
Where the label's log-prob is below SHIFT - RANGE = -48 nats, the statistics pass does the row once
more, shifted by the log-sum-exp. fp16 has no room for such exponentials and takes two GEMMs.

Memory: the (T, V) matrix itself in the input dtype.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, GROUP_T, LABEL_LOGITS
from fastpref_kernels.common.gemm_tile import (
    IGNORE_INDEX,
    chain_rule,
    column_quarters,
    finish_logits,
    grouped_tile,
    matmul_tile,
    soft_cap,
)
from fastpref_kernels.common.launch import dense_rows, gemm_config, operands
from fastpref_kernels.softmax_stats import Exps, TokenStats, linear_softmax_fwd

SHIFT = 16.0  # nats


@triton.jit
def label_logits_kernel(
    hidden,  # (T, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    labels,  # (T,)
    logits,  # (T,), written; 0 for a label outside the vocabulary
    V,
    D,
    stride_h,
    stride_w,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weight + label * stride_w + d, mask=d < D, other=0.0).to(tl.float32)
        products += h * w
    x = tl.sum(products, axis=0)
    if bias is not None:
        x += tl.load(bias + label).to(tl.float32)
    x *= logit_scale
    if softcap is not None:
        x = soft_cap(x, softcap)
    tl.store(logits + row, tl.where(known, x, 0.0))


@triton.jit
def linear_delta_kernel(
    hidden,  # (T, D)
    weight,  # (V, D), some rows of the head
    bias,  # (V,) or None
    labels,  # (T,)
    lse,  # (T,)
    delta,  # (T, V), written
    first,  # the vocabulary index of the first row of weight
    T,
    V,
    D,
    stride_h,
    stride_w,
    stride_e,
    logit_scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_block, tile = grouped_tile(
        tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP
    )
    row = row_block * BLOCK_T
    acc = matmul_tile(
        hidden, weight, row, tile * BLOCK_V, T, V, D, stride_h, stride_w,
        BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    label = tl.load(labels + rows, mask=row_mask, other=IGNORE_INDEX).to(tl.int32)
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    kept = (label != IGNORE_INDEX)[:, None]
    quarters = column_quarters(acc, BLOCK_T, BLOCK_V)
    for quarter in tl.static_range(4):
        col = tile * BLOCK_V + quarter * (BLOCK_V // 4)
        local = tl.arange(0, BLOCK_V // 4)
        x = finish_logits(quarters[quarter], col, bias, V, logit_scale, softcap, BLOCK_V // 4)
        hit = local[None, :] == (label - first - col)[:, None]
        p = tl.exp(tl.minimum(x - row_lse[:, None], 0.0))
        d = chain_rule(hit.to(tl.float32) - p, x, logit_scale, softcap)
        tl.store(
            delta + rows[:, None].to(tl.int64) * stride_e + (col + local)[None, :],
            tl.where(kept, d, 0.0).to(delta.dtype.element_ty),
            mask=row_mask[:, None] & (local[None, :] < V - col),
        )


def softmax_delta(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    delta: Tensor,  # (T, V), rows of unit stride, written
    factor: Tensor,  # (T,) fp32, written
) -> TokenStats:
    """Log-probs and log-sum-exps of checked inputs; factor_t * delta_t is the delta of a row."""
    head = (bias, logit_scale, softcap)
    if torch.finfo(delta.dtype).max < torch.finfo(torch.bfloat16).max:
        stats = linear_softmax_fwd(hidden, weight, labels, *head, full=False)
        linear_delta(hidden, weight, labels, *head, stats.lse, delta)
        factor.fill_(1.0)
        return stats
    shift = label_logits(hidden, weight, labels, *head).add_(SHIFT)
    kept = Exps(delta, shift, factor)
    return linear_softmax_fwd(hidden, weight, labels, *head, full=False, kept=kept)


def label_logits(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The label's logit of each row, (T,) fp32, but for the order of summation."""
    T, D = hidden.shape
    logits = torch.empty(T, dtype=torch.float32, device=hidden.device)
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    if T > 0:
        label_logits_kernel[(T,)](
            hidden, weight, None if bias is None else bias.contiguous(), labels.contiguous(),
            logits, weight.shape[0], D, hidden.stride(0), weight.stride(0), float(logit_scale),
            None if softcap is None else float(softcap),
            BLOCK=LABEL_LOGITS.block_t, num_warps=LABEL_LOGITS.num_warps,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return logits


def linear_delta(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D): all rows of the head, or those from `first` on
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,): of the same rows
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,  # (T,) over the whole vocabulary
    delta: Tensor,  # (T, V), rows of unit stride, written
    first: int = 0,
) -> Tensor:
    """delta for the given rows of the head, whose log-sum-exp is known; returns `delta`."""
    T, V = delta.shape
    if T > 0:
        config = gemm_config(hidden)
        grid = (triton.cdiv(T, config.block_t) * triton.cdiv(V, config.block_v),)
        linear_delta_kernel[grid](
            bias=None if bias is None else bias.contiguous(),
            labels=labels.contiguous(),
            lse=lse,
            delta=delta,
            first=first,
            stride_e=delta.stride(0),
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
            GROUP=GROUP_T,
            **operands(hidden, weight, config),
        )
    return delta
