"""Token log-probs, log-sum-exp, entropy and top-1 in one pass over the head.

    x_tv = logit_scale * (hidden_t . weight_v + bias_v), soft-capped
    lse_t = log sum_v e^x_tv      logps_t = x_ty - lse_t      entropy_t = -sum_v p_tv log p_tv

Each program owns block_t rows and one panel of the vocabulary, which it walks tile by tile with an
online softmax; its fp32 partials, (panels, T), are merged by a second kernel in panel order. Panels
do not depend on T, and nothing is added atomically: a token's numbers are the same to the bit
whatever the tokens around it.

Extra memory: 8 bytes a token and panel of 2048 columns (12 with the entropy), so 4 MB for
8192 tokens and 128k columns. The training pass uses the same kernel and asks it, in addition, for
e^(x - running max), rounded once to the input dtype: relative error 2^-8 in bf16, where a rounded
logit of 20 would carry 6 per cent into its probability.
"""

# mypy: allow-untyped-defs
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import GROUP_T, MERGE
from .launch import gemm_config, operands
from .tiles import IGNORE_INDEX, column_quarters, finish_logits, grouped_tile, matmul_tile


class TokenStats(NamedTuple):
    """Per-token statistics, fp32 in nats; zero (False) where the label is -100."""

    logps: Tensor  # (T,) log-prob of the label
    lse: Tensor  # (T,) log-sum-exp of the logits
    entropy: Tensor | None  # (T,) in nats
    top1: Tensor | None  # (T,) bool: no logit is larger than the label's


@triton.jit
def linear_softmax_fwd_kernel(
    hidden,  # (T, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    labels,  # (T,)
    target,  # (T,) logit of the label, written by the one program that meets it
    panel_max,  # (panels, T)
    panel_sum,  # (panels, T) sum of e^(x - max)
    panel_dot,  # (panels, T) sum of (x - max) e^(x - max), or None
    exps,  # (T, V) e^(x - block_max), or None
    block_max,  # (blocks of BLOCK_V / 4 columns, T) or None
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
    PANEL_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles = tl.cdiv(V, BLOCK_V)
    panels = tl.cdiv(tiles, PANEL_TILES)
    row_block, panel = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_T), panels, GROUP)
    row = row_block * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    label = tl.load(labels + rows, mask=row_mask, other=IGNORE_INDEX).to(tl.int32)

    m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)

    first_tile = panel * PANEL_TILES
    for tile in range(first_tile, tl.minimum(first_tile + PANEL_TILES, tiles)):
        acc = matmul_tile(
            hidden, weight, row, tile * BLOCK_V, T, V, D, stride_h, stride_w,
            BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
        )  # fmt: skip
        quarters = column_quarters(acc, BLOCK_T, BLOCK_V)
        for quarter in tl.static_range(4):
            block = 4 * tile + quarter
            col = block * (BLOCK_V // 4)
            local = tl.arange(0, BLOCK_V // 4)
            x = finish_logits(quarters[quarter], col, bias, V, logit_scale, softcap, BLOCK_V // 4)
            at = label - col
            # Most blocks hold no label, and the branch frees the registers of those that do not.
            if tl.max(((at >= 0) & (at < BLOCK_V // 4)).to(tl.int32), axis=0) > 0:
                target_logit += tl.sum(tl.where(local[None, :] == at[:, None], x, 0.0), axis=1)

            new_m = tl.maximum(m, tl.max(x, axis=1))
            # A row of -inf so far (a bias may be -inf) has no maximum to subtract.
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)
            decay = tl.exp(m - shift)
            # -200 stands for -inf: its exponential is 0 too, and 0 times it is not NaN.
            below = tl.maximum(x - shift[:, None], -200.0)
            e = tl.exp(below)
            if panel_dot is not None:
                # Moving the maximum moves every earlier (x - max) by the same amount.
                moved = tl.where(m == float("-inf"), 0.0, m - shift)
                dot = (dot + moved * s) * decay + tl.sum(below * e, axis=1)
            s = s * decay + tl.sum(e, axis=1)
            m = new_m
            if exps is not None:
                tl.store(
                    exps + rows[:, None].to(tl.int64) * stride_e + (col + local)[None, :],
                    e.to(exps.dtype.element_ty),
                    mask=row_mask[:, None] & (local[None, :] < V - col),
                )
                tl.store(block_max + tl.cast(block, tl.int64) * T + rows, shift, mask=row_mask)

    offsets = panel.to(tl.int64) * T + rows
    tl.store(panel_max + offsets, m, mask=row_mask)
    tl.store(panel_sum + offsets, s, mask=row_mask)
    if panel_dot is not None:
        tl.store(panel_dot + offsets, dot, mask=row_mask)
    start = first_tile * BLOCK_V
    met = (label >= start) & (label < tl.minimum(start + PANEL_TILES * BLOCK_V, V))
    tl.store(target + rows, target_logit, mask=row_mask & met)


@triton.jit
def merge_fwd_kernel(
    labels,  # (T,)
    target,  # (T,)
    panel_max,  # (panels, T)
    panel_sum,
    panel_dot,  # or None
    logps,  # (T,)
    lse,  # (T,)
    entropy,  # (T,) or None
    top1,  # (T,) uint8, or None
    T,
    panels,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < T
    label = tl.load(labels + rows, mask=mask, other=IGNORE_INDEX)
    kept = label != IGNORE_INDEX
    m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for panel in range(panels):
        offsets = tl.cast(panel, tl.int64) * T + rows
        panel_m = tl.load(panel_max + offsets, mask=mask, other=0.0)
        panel_s = tl.load(panel_sum + offsets, mask=mask, other=1.0)
        new_m = tl.maximum(m, panel_m)
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        old, new = tl.exp(m - shift), tl.exp(panel_m - shift)
        if panel_dot is not None:
            panel_d = tl.load(panel_dot + offsets, mask=mask, other=0.0)
            moved = tl.where(m == float("-inf"), 0.0, m - shift)
            panel_moved = tl.where(panel_m == float("-inf"), 0.0, panel_m - shift)
            dot = (dot + moved * s) * old + (panel_d + panel_moved * panel_s) * new
        s = s * old + panel_s * new
        m = new_m

    log_s = tl.log(s)
    x = tl.load(target + rows, mask=mask & kept, other=0.0)
    # (x - m) first: both may be large, their difference is what must be exact.
    tl.store(logps + rows, tl.where(kept, (x - m) - log_s, 0.0), mask=mask)
    tl.store(lse + rows, tl.where(kept, m + log_s, 0.0), mask=mask)
    if panel_dot is not None:
        tl.store(entropy + rows, tl.where(kept, log_s - dot / s, 0.0), mask=mask)
        tl.store(top1 + rows, (kept & (x >= m)).to(tl.uint8), mask=mask)


def linear_softmax_fwd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    *,
    full: bool,
    exps: Tensor | None = None,  # (T, V), written
    block_max: Tensor | None = None,  # (blocks, T), written
) -> TokenStats:
    """The statistics of checked inputs; entropy and top-1 only when `full`."""
    T, V = hidden.shape[0], weight.shape[0]
    config = gemm_config(hidden)
    fp32 = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    logps, lse = fp32(T), fp32(T)
    entropy = fp32(T) if full else None
    top1 = torch.empty(T, dtype=torch.bool, device=hidden.device) if full else None
    if T == 0:
        return TokenStats(logps, lse, entropy, top1)

    panels = triton.cdiv(triton.cdiv(V, config.block_v), config.panel_tiles)
    labels = labels.contiguous()
    target = fp32(T).fill_(float("nan"))  # a label outside [0, V) stays visible
    panel_max, panel_sum = fp32((2, panels, T))
    panel_dot = fp32((panels, T)) if full else None
    linear_softmax_fwd_kernel[(triton.cdiv(T, config.block_t) * panels,)](
        bias=None if bias is None else bias.contiguous(),
        labels=labels,
        target=target,
        panel_max=panel_max,
        panel_sum=panel_sum,
        panel_dot=panel_dot,
        exps=exps,
        block_max=block_max,
        stride_e=0 if exps is None else exps.stride(0),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        PANEL_TILES=config.panel_tiles,
        GROUP=GROUP_T,
        **operands(hidden, weight, config),
    )
    merge_fwd_kernel[(triton.cdiv(T, MERGE.block_t),)](
        labels, target, panel_max, panel_sum, panel_dot, logps, lse, entropy,
        None if top1 is None else top1.view(torch.uint8),
        T, panels, BLOCK_T=MERGE.block_t, num_warps=MERGE.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return TokenStats(logps, lse, entropy, top1)
