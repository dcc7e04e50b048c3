"""delta = d logps / d (hidden @ weight.T): the score of a token with respect to its own products.

    delta_tv = (onehot(y_t)_v - p_tv) * logit_scale * (1 - (x_tv / softcap)^2)

and 0 in rows labelled -100. Two ways to it, both from fp32 logits that are never written:

- `softmax_delta`, one GEMM: the statistics pass leaves e^(x - running max) behind, and a second,
  memory-bound pass turns it into delta in place. Rounded twice to the input dtype: 2 * 2^-8 of an
  entry in bf16. That holds for the label's own 1 - p, too: a p above 1/2 is the maximum of its
  row, whose exponential is exactly 1.
- `linear_delta`, one GEMM, for any columns of the vocabulary once the log-sum-exp is known: the
  recomputation. Rounded once.

Memory: the (T, V) matrix itself in the input dtype, and, in `softmax_delta`, one fp32 maximum
per row and block of columns (1/32 of a bf16 matrix).
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import DELTA, GROUP_T
from .forward import TokenStats, linear_softmax_fwd
from .launch import gemm_config, operands
from .tiles import IGNORE_INDEX, column_quarters, finish_logits, grouped_tile, matmul_tile


@triton.jit
def chain_rule(d, x, logit_scale, softcap):
    """d L / d product from d = d L / d x, given the finished logit x."""
    d *= logit_scale
    if softcap is not None:
        ratio = tl.maximum(x / softcap, -1.0)  # x is -inf where its exponential underflowed
        d *= 1.0 - ratio * ratio
    return d


@triton.jit
def delta_kernel(
    delta,  # (T, V), e^(x - block_max) on entry
    block_max,  # (blocks, T)
    labels,  # (T,)
    logps,  # (T,)
    lse,  # (T,)
    active,  # (row blocks, column blocks) uint8, written: something is above; or None
    T,
    V,
    stride_e,
    logit_scale,
    softcap,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(1).to(tl.int64)
    cols = block * BLOCK_E + tl.arange(0, BLOCK_E)
    row_mask = rows < T
    mask = row_mask[:, None] & (cols[None, :] < V)
    label = tl.load(labels + rows, mask=row_mask, other=IGNORE_INDEX)
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    m = tl.load(block_max + block * T + rows, mask=row_mask, other=0.0)

    ptrs = delta + rows[:, None].to(tl.int64) * stride_e + cols[None, :]
    e = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    hit = cols[None, :] == label[:, None]
    d = hit.to(tl.float32) - e * tl.exp(m - row_lse)[:, None]
    # Where e underflowed its logit is lost: delta is 0 there anyway, except for the label.
    row_logp = tl.load(logps + rows, mask=row_mask, other=0.0)
    x = tl.where(hit, (row_logp + row_lse)[:, None], tl.log(e) + m[:, None])
    d = chain_rule(d, x, logit_scale, softcap)
    d = tl.where((label == IGNORE_INDEX)[:, None], 0.0, d)
    tl.store(ptrs, d.to(delta.dtype.element_ty), mask=mask)
    if active is not None:
        size = tl.where(d == d, tl.abs(d), float("inf"))  # NaN must not be left out
        largest = tl.max(tl.max(tl.where(mask, size, 0.0), axis=1), axis=0)
        flag = active + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(flag, (largest >= threshold).to(tl.uint8))


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
    active: Tensor | None = None,  # (row blocks, column blocks) uint8, written
    threshold: float = 0.0,
) -> TokenStats:
    """Log-probs and log-sum-exps of checked inputs, and delta, from one GEMM.

    active: which blocks of DELTA.block_t rows and block_e columns hold an entry >= threshold.
    """
    T, V = delta.shape
    config = gemm_config(hidden)
    blocks = 4 * triton.cdiv(V, config.block_v)  # whole tiles: the last may lie past V in part
    block_max = torch.empty(blocks, T, dtype=torch.float32, device=hidden.device)
    labels = labels.contiguous()
    stats = linear_softmax_fwd(
        hidden, weight, labels, bias, logit_scale, softcap,
        full=False, exps=delta, block_max=block_max,
    )  # fmt: skip
    if T > 0:
        delta_kernel[(triton.cdiv(T, DELTA.block_t), triton.cdiv(V, config.block_e))](
            delta, block_max, labels, stats.logps, stats.lse, active, T, V, delta.stride(0),
            float(logit_scale), None if softcap is None else float(softcap), threshold,
            BLOCK_T=DELTA.block_t, BLOCK_E=config.block_e,
            num_warps=DELTA.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return stats


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
