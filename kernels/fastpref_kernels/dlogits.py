"""dlogits = d logps / d (hidden @ weight.T): the gradient by the raw logits, per unit upstream.

    dlogits_tv = (onehot(y_t)_v - p_tv) * logit_scale * (1 - (logits_tv / softcap)^2)

and 0 in rows labeled -100. Two functions compute it, both from fp32 logits that are never written:

- `softmax_dlogits`, one GEMM: the TRAIN mode of `softmax_stats.py` writes e^(logits - shift), which
  is dlogits but for a factor of each row and the entry of its label; the kernel that merges the
  statistics knows the log-sum-exp and writes both. Rounded once to the input dtype.
- `linear_dlogits`, one GEMM, for any columns of the vocabulary once the log-sum-exp is known: the
  recomputation. Rounded once.

The shift is the label's own logit plus SHIFT: any number within RANGE of the log-sum-exp is fine.
Where the label's log-prob is below SHIFT - RANGE = -48 nats, the REDO mode computes the row once
more, shifted by the log-sum-exp. fp16 has no room for such exponentials and takes two GEMMs.

Memory: the (T, V) matrix itself in the input dtype.
"""

# mypy: allow-untyped-defs
from typing import TYPE_CHECKING

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
    store_columns,
)
from fastpref_kernels.common.launch import (
    bias_operand,
    dense_rows,
    gemm_config,
    head_scalars,
    operands,
)
from fastpref_kernels.softmax_stats import TokenStats, TrainBuffers, linear_softmax_fwd

if TYPE_CHECKING:
    from fastpref.ops.backend import Head

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
    in_vocabulary = (label >= 0) & (label < V)
    label = tl.where(in_vocabulary, label, 0)
    partial_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weight + label * stride_w + d, mask=d < D, other=0.0).to(tl.float32)
        partial_sums += h * w
    logit = tl.sum(partial_sums, axis=0)
    if bias is not None:
        logit += tl.load(bias + label).to(tl.float32)
    logit *= logit_scale
    if softcap is not None:
        logit = soft_cap(logit, softcap)
    tl.store(logits + row, tl.where(in_vocabulary, logit, 0.0))


@triton.jit
def linear_dlogits_kernel(
    hidden,  # (T, D)
    weight,  # (V, D), some rows of the head
    bias,  # (V,) or None
    labels,  # (T,)
    lse,  # (T,)
    dlogits,  # (T, V), written
    first,  # the vocabulary index of the first row of weight
    T,
    V,
    D,
    stride_h,
    stride_w,
    stride_dlogits,
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
    valid = (label != IGNORE_INDEX)[:, None]
    quarters = column_quarters(acc, BLOCK_T, BLOCK_V)
    for quarter in tl.static_range(4):
        col = tile * BLOCK_V + quarter * (BLOCK_V // 4)
        local = tl.arange(0, BLOCK_V // 4)
        logits = finish_logits(quarters[quarter], col, bias, V, logit_scale, softcap, BLOCK_V // 4)
        is_label = local[None, :] == (label - first - col)[:, None]
        p = tl.exp(tl.minimum(logits - row_lse[:, None], 0.0))
        values = chain_rule(is_label.to(tl.float32) - p, logits, logit_scale, softcap)
        values = tl.where(valid, values, 0.0)
        store_columns(
            dlogits, values, rows, row_mask[:, None], col, V, stride_dlogits, BLOCK_V // 4
        )


def softmax_dlogits(
    hidden: Tensor,  # (T, D)
    head: "Head",
    labels: Tensor,  # (T,)
    dlogits: Tensor,  # (T, V), rows of unit stride, written
    row_scale: Tensor,  # (T,) fp32, written
) -> TokenStats:
    """Log-probs and log-sum-exps of checked inputs; the gradient is row_scale_t * dlogits_t."""
    if torch.finfo(dlogits.dtype).max < torch.finfo(torch.bfloat16).max:
        stats = linear_softmax_fwd(hidden, head, labels, full=False)
        linear_dlogits(hidden, head, labels, stats.lse, dlogits)
        row_scale.fill_(1.0)
        return stats
    shift = label_logits(hidden, head, labels).add_(SHIFT)
    train = TrainBuffers(dlogits, shift, row_scale)
    return linear_softmax_fwd(hidden, head, labels, full=False, train=train)


def label_logits(
    hidden: Tensor,  # (T, D)
    head: "Head",
    labels: Tensor,  # (T,)
) -> Tensor:
    """Logit of each row's label, (T,) fp32; the GEMMs sum in another order."""
    T, D = hidden.shape
    logits = torch.empty(T, dtype=torch.float32, device=hidden.device)
    hidden, weight = dense_rows(hidden), dense_rows(head.weight)
    if T > 0:
        label_logits_kernel[(T,)](
            hidden=hidden,
            weight=weight,
            bias=bias_operand(head),
            labels=labels.contiguous(),
            logits=logits,
            V=weight.shape[0],
            D=D,
            stride_h=hidden.stride(0),
            stride_w=weight.stride(0),
            BLOCK=LABEL_LOGITS.block_t,
            num_warps=LABEL_LOGITS.num_warps,
            enable_fp_fusion=FP_FUSION,
            **head_scalars(head),
        )
    return logits


def linear_dlogits(
    hidden: Tensor,  # (T, D)
    head: "Head",  # all rows of the head, or those from `first` on
    labels: Tensor,  # (T,)
    lse: Tensor,  # (T,) over the whole vocabulary
    dlogits: Tensor,  # (T, V), rows of unit stride, written
    first: int = 0,
) -> Tensor:
    """Recompute dlogits for the given rows of the head from the log-sum-exp; returns `dlogits`."""
    T, V = dlogits.shape
    if T > 0:
        config = gemm_config(hidden)
        grid = (triton.cdiv(T, config.block_t) * triton.cdiv(V, config.block_v),)
        linear_dlogits_kernel[grid](
            bias=bias_operand(head),
            labels=labels.contiguous(),
            lse=lse,
            dlogits=dlogits,
            first=first,
            stride_dlogits=dlogits.stride(0),
            GROUP=GROUP_T,
            **head_scalars(head),
            **operands(hidden, head.weight, config),
        )
    return dlogits
