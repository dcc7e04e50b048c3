"""Token log-probs, log-sum-exp, entropy and top-1 in one pass over the head.

    x_tv = logit_scale * (hidden_t . weight_v + bias_v), soft-capped
    lse_t = log sum_v e^x_tv      logps_t = x_ty - lse_t      entropy_t = -sum_v p_tv log p_tv

Each program owns block_t rows and one panel of the vocabulary, which it walks tile by tile with an
online softmax; its fp32 partials, (panels, T), are merged by a second kernel in panel order. Panels
do not depend on T, and nothing is added atomically: a token's numbers are the same to the bit
whatever the tokens around it, and, since the compiler fuses no operations, in every variant.

Extra memory: 8 bytes a token and panel (12 with the entropy), so 33 MB for 8192 tokens and 128k
columns in panels of 256. The training pass (`delta.py`) uses the same kernel and asks it, in
addition, for e^(x - shift), rounded once to the input dtype: relative error 2^-8 in bf16, where a
rounded logit of 20 would carry 6 per cent into its probability.
"""

# mypy: allow-untyped-defs
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import AGAIN_PANELS, FP_FUSION, GROUP_T, MERGE, MERGE_PANELS
from fastpref_kernels.common.gemm_tile import (
    IGNORE_INDEX,
    cap_slope,
    column_quarters,
    finish_logits,
    grouped_tile,
    matmul_tile,
)
from fastpref_kernels.common.launch import gemm_config, operands
from fastpref_kernels.common.numerics import one_minus_exp

RANGE = tl.constexpr(64.0)  # nats between log-sum-exp and shift; bf16 and fp32 hold e^-87 to e^88


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
    exps,  # (T, V) e^(x - shift) times the slope of the soft cap, 0 where ignored; or None
    shift,  # (T,) or None
    again,  # (T,) uint8 or None: the only rows to do, and not to touch the exps of their labels
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
    first_tile = panel * PANEL_TILES
    stop = tl.minimum(first_tile + PANEL_TILES, tiles)
    if again is not None:
        row_mask = row_mask & (tl.load(again + rows, mask=row_mask, other=0) > 0)
        stop = tl.where(tl.max(row_mask.to(tl.int32), axis=0) > 0, stop, first_tile)
    label = tl.load(labels + rows, mask=row_mask, other=IGNORE_INDEX).to(tl.int32)
    if exps is not None:
        row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)

    m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)

    for tile in range(first_tile, stop):
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
            top = tl.where(new_m == float("-inf"), 0.0, new_m)
            decay = tl.exp(m - top)
            # -200 stands for -inf: its exponential is 0 too, and 0 times it is not NaN.
            below = tl.maximum(x - top[:, None], -200.0)
            e = tl.exp(below)
            if panel_dot is not None:
                # Moving the maximum moves every earlier (x - max) by the same amount.
                moved = tl.where(m == float("-inf"), 0.0, m - top)
                dot = (dot + moved * s) * decay + tl.sum(below * e, axis=1)
            s = s * decay + tl.sum(e, axis=1)
            m = new_m
            if exps is not None:
                e *= tl.exp(tl.minimum(top - row_shift, 88.0))[:, None]
                if softcap is not None:
                    e *= cap_slope(x, softcap)
                inside = row_mask[:, None] & (local[None, :] < V - col)
                if again is not None:
                    inside = inside & (local[None, :] != at[:, None])
                tl.store(
                    exps + rows[:, None].to(tl.int64) * stride_e + (col + local)[None, :],
                    tl.where((label != IGNORE_INDEX)[:, None], e, 0.0).to(exps.dtype.element_ty),
                    mask=inside,
                )

    if again is None:
        offsets = panel.to(tl.int64) * T + rows
        tl.store(panel_max + offsets, m, mask=row_mask)
        tl.store(panel_sum + offsets, s, mask=row_mask)
        if panel_dot is not None:
            tl.store(panel_dot + offsets, dot, mask=row_mask)
        start = first_tile * BLOCK_V
        met = (label >= start) & (label < tl.minimum(start + PANEL_TILES * BLOCK_V, V))
        tl.store(target + rows, target_logit, mask=row_mask & met)


# Sums over panels are of the layout of their loads, which must not depend on T or on an address: a
# token's bits would depend on how many tokens come with it.
@triton.jit(
    do_not_specialize=["T", "panels"],
    do_not_specialize_on_alignment=["panel_max", "panel_sum", "panel_dot"],
)
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
    exps,  # (T, V) or None: its entries of the labels are written
    shift,  # (T,) or None; the log-sum-exp of the rows to do again
    again,  # (T,) uint8, or None
    factor,  # (T,) or None: what delta is in units of exps
    T,
    V,
    panels,
    stride_e,
    logit_scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < T
    label = tl.load(labels + rows, mask=mask, other=IGNORE_INDEX)
    kept = label != IGNORE_INDEX
    m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(0, panels, BLOCK_P):
        panel = first + tl.arange(0, BLOCK_P)
        inside = (panel < panels)[:, None] & mask[None, :]
        offsets = panel[:, None].to(tl.int64) * T + rows[None, :]
        panel_m = tl.load(panel_max + offsets, mask=inside, other=float("-inf"))
        panel_s = tl.load(panel_sum + offsets, mask=inside, other=0.0)
        new_m = tl.maximum(m, tl.max(panel_m, axis=0))
        top = tl.where(new_m == float("-inf"), 0.0, new_m)
        old, new = tl.exp(m - top), tl.exp(panel_m - top[None, :])
        if panel_dot is not None:
            panel_d = tl.load(panel_dot + offsets, mask=inside, other=0.0)
            moved = tl.where(m == float("-inf"), 0.0, m - top)
            panel_moved = tl.where(panel_m == float("-inf"), 0.0, panel_m - top[None, :])
            panel_d = (panel_d + panel_moved * panel_s) * new
            dot = (dot + moved * s) * old + tl.sum(panel_d, axis=0)
        s = s * old + tl.sum(panel_s * new, axis=0)
        m = new_m

    log_s = tl.log(s)
    row_lse = m + log_s
    x = tl.load(target + rows, mask=mask & kept, other=0.0)
    # (x - m) first: both may be large, their difference is what must be exact.
    logp = (x - m) - log_s
    tl.store(logps + rows, tl.where(kept, logp, 0.0), mask=mask)
    tl.store(lse + rows, tl.where(kept, row_lse, 0.0), mask=mask)
    if panel_dot is not None:
        tl.store(entropy + rows, tl.where(kept, log_s - dot / s, 0.0), mask=mask)
        tl.store(top1 + rows, (kept & (x >= m)).to(tl.uint8), mask=mask)
    if exps is not None:
        distance = row_lse - tl.load(shift + rows, mask=mask, other=0.0)
        redo = kept & ((tl.abs(distance) < RANGE) == 0)  # NaN is not within any range
        distance = tl.where(redo, 0.0, distance)
        tl.store(shift + rows, row_lse, mask=mask & redo)
        tl.store(again + rows, redo.to(tl.uint8), mask=mask)
        tl.store(factor + rows, tl.where(kept, -logit_scale * tl.exp(-distance), 0.0), mask=mask)
        own = -one_minus_exp(tl.minimum(logp, 0.0)) * tl.exp(distance)
        if softcap is not None:
            own *= cap_slope(x, softcap)
        tl.store(
            exps + rows.to(tl.int64) * stride_e + label,
            own.to(exps.dtype.element_ty),
            mask=mask & (label >= 0) & (label < V),
        )


class Exps(NamedTuple):
    """What the training pass leaves behind for `delta.py`, all of it written."""

    exps: Tensor  # (T, V), rows of unit stride: e^(x - shift), changed where the label is
    shift: Tensor  # (T,) fp32, near enough to the log-sum-exp; given, and mended where it is not
    factor: Tensor  # (T,) fp32: factor_t * exps_t = delta_t


def linear_softmax_fwd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    *,
    full: bool,
    kept: Exps | None = None,
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

    blocks, tiles = triton.cdiv(T, config.block_t), triton.cdiv(V, config.block_v)
    panels = triton.cdiv(tiles, config.panel_tiles)
    labels = labels.contiguous()
    target = fp32(T).fill_(float("nan"))  # a label outside [0, V) stays visible
    panel_max, panel_sum = fp32((2, panels, T))
    panel_dot = fp32((panels, T)) if full else None
    exps, shift, factor = (None, None, None) if kept is None else kept
    again = None if kept is None else torch.empty(T, dtype=torch.uint8, device=hidden.device)
    head = {
        "logit_scale": float(logit_scale),
        "softcap": None if softcap is None else float(softcap),
        "stride_e": 0 if exps is None else exps.stride(0),
    }
    partials = {
        "labels": labels,
        "target": target,
        "panel_max": panel_max,
        "panel_sum": panel_sum,
        "panel_dot": panel_dot,
    }
    arguments = {
        "bias": None if bias is None else bias.contiguous(),
        "exps": exps,
        "shift": shift,
        "GROUP": GROUP_T,
        **partials,
        **head,
        **operands(hidden, weight, config),
    }
    linear_softmax_fwd_kernel[(blocks * panels,)](
        again=None, PANEL_TILES=config.panel_tiles, **arguments
    )
    merge_fwd_kernel[(triton.cdiv(T, MERGE.block_t),)](
        logps=logps,
        lse=lse,
        entropy=entropy,
        top1=None if top1 is None else top1.view(torch.uint8),
        exps=exps,
        shift=shift,
        again=again,
        factor=factor,
        T=T,
        V=V,
        panels=panels,
        BLOCK_T=MERGE.block_t,
        BLOCK_P=MERGE_PANELS,
        num_warps=MERGE.num_warps,
        enable_fp_fusion=FP_FUSION,
        **partials,
        **head,
    )
    if again is not None:  # nearly always no row: few programs, which find nothing to do
        linear_softmax_fwd_kernel[(blocks * triton.cdiv(panels, AGAIN_PANELS),)](
            again=again, PANEL_TILES=AGAIN_PANELS * config.panel_tiles, **arguments
        )
    return TokenStats(logps, lse, entropy, top1)
