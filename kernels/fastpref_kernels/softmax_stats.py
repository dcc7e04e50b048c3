"""Token log-probs, log-sum-exp, entropy and top-1 from one GEMM over the head.

    logits_tv = logit_scale * (hidden_t . weight_v + bias_v), soft-capped
    lse_t = log sum_v e^logits_tv     logps_t = logits_ty - lse_t
    entropy_t = -sum_v p_tv log p_tv

`linear_softmax_fwd_kernel` has three modes:

    STATS  statistics of each row, and nothing of size (T, V)
    TRAIN  the same, and e^(logits - shift), (T, V), from which `dlogits.py` makes the gradient
    REDO   e^(logits - shift) once more, for the few rows whose shift was too far from their lse

Each program owns block_t rows and one panel of the vocabulary, which it walks tile by tile with an
online softmax; its fp32 partial sums, (panels, T), are merged by a second kernel in panel order.
Panels do not depend on T, there are no atomics, and the compiler fuses no operations: a token's
numbers are the same to the bit in every mode and whatever other tokens come with it.

Extra memory: 8 bytes a token and panel (12 with the entropy), so 33 MB for 8192 tokens and 128k
columns in panels of 256. The exponentials of TRAIN are rounded once to the input dtype: relative
error 2^-8 in bf16, where a rounded logit of 20 would carry 6 per cent into its probability.
"""

# mypy: allow-untyped-defs
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, GROUP_T, MERGE, MERGE_PANELS, REDO_PANELS
from fastpref_kernels.common.gemm_tile import (
    IGNORE_INDEX,
    cap_slope,
    column_quarters,
    finish_logits,
    grouped_tile,
    matmul_tile,
    store_columns,
)
from fastpref_kernels.common.launch import bias_operand, gemm_config, head_scalars, operands
from fastpref_kernels.common.numerics import one_minus_exp

if TYPE_CHECKING:
    from fastpref.ops.backend import Head

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
    target_logits,  # (T,) logit of the label, written by the one program that meets it
    panel_max,  # (panels, T)
    panel_sum,  # (panels, T) sum of e^(logits - max)
    panel_dot,  # (panels, T) sum of (logits - max) e^(logits - max), or None
    exp_logits,  # (T, V) e^(logits - shift) times the soft cap's slope, 0 where ignored; or None
    shift,  # (T,) or None
    redo_mask,  # (T,) uint8 or None
    T,
    V,
    D,
    stride_h,
    stride_w,
    stride_exp,
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
    """STATS without exp_logits, TRAIN with it, REDO with redo_mask as well.

    REDO recomputes only the rows of redo_mask, leaves the entries of their labels unchanged and
    writes no statistics.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    panels = tl.cdiv(tiles, PANEL_TILES)
    row_block, panel = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_T), panels, GROUP)
    row = row_block * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    first_tile = panel * PANEL_TILES
    stop = tl.minimum(first_tile + PANEL_TILES, tiles)
    if redo_mask is not None:
        row_mask = row_mask & (tl.load(redo_mask + rows, mask=row_mask, other=0) > 0)
        stop = tl.where(tl.max(row_mask.to(tl.int32), axis=0) > 0, stop, first_tile)
    label = tl.load(labels + rows, mask=row_mask, other=IGNORE_INDEX).to(tl.int32)
    if exp_logits is not None:
        row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)

    running_max = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_T,), dtype=tl.float32)
    running_dot = tl.zeros((BLOCK_T,), dtype=tl.float32)

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
            logits = finish_logits(
                quarters[quarter], col, bias, V, logit_scale, softcap, BLOCK_V // 4
            )
            label_column = label - col
            # Most blocks hold no label, and the branch frees the registers of those that do not.
            has_label = (label_column >= 0) & (label_column < BLOCK_V // 4)
            if tl.max(has_label.to(tl.int32), axis=0) > 0:
                is_label = local[None, :] == label_column[:, None]
                target_logit += tl.sum(tl.where(is_label, logits, 0.0), axis=1)

            new_max = tl.maximum(running_max, tl.max(logits, axis=1))
            # A row of -inf so far (a bias may be -inf) has no maximum to subtract.
            row_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            decay = tl.exp(running_max - row_max)
            # -200 stands for -inf: its exponential is 0 too, and 0 times it is not NaN.
            shifted = tl.maximum(logits - row_max[:, None], -200.0)
            exp_shifted = tl.exp(shifted)
            if panel_dot is not None:
                # A new maximum changes every earlier (logits - max) by the same amount.
                max_change = tl.where(running_max == float("-inf"), 0.0, running_max - row_max)
                running_dot = (running_dot + max_change * running_sum) * decay + tl.sum(
                    shifted * exp_shifted, axis=1
                )
            running_sum = running_sum * decay + tl.sum(exp_shifted, axis=1)
            running_max = new_max
            if exp_logits is not None:
                exp_shifted *= tl.exp(tl.minimum(row_max - row_shift, 88.0))[:, None]
                if softcap is not None:
                    exp_shifted *= cap_slope(logits, softcap)
                mask = row_mask[:, None]
                if redo_mask is not None:
                    mask = mask & (local[None, :] != label_column[:, None])
                values = tl.where((label != IGNORE_INDEX)[:, None], exp_shifted, 0.0)
                store_columns(exp_logits, values, rows, mask, col, V, stride_exp, BLOCK_V // 4)

    if redo_mask is None:
        offsets = panel.to(tl.int64) * T + rows
        tl.store(panel_max + offsets, running_max, mask=row_mask)
        tl.store(panel_sum + offsets, running_sum, mask=row_mask)
        if panel_dot is not None:
            tl.store(panel_dot + offsets, running_dot, mask=row_mask)
        start = first_tile * BLOCK_V
        owns_label = (label >= start) & (label < tl.minimum(start + PANEL_TILES * BLOCK_V, V))
        tl.store(target_logits + rows, target_logit, mask=row_mask & owns_label)


# The layout of a sum over panels is that of its loads. It must not depend on T or on an address:
# a token's bits would depend on how many tokens come with it.
@triton.jit(
    do_not_specialize=["T", "panels"],
    do_not_specialize_on_alignment=["panel_max", "panel_sum", "panel_dot"],
)
def merge_fwd_kernel(
    labels,  # (T,)
    target_logits,  # (T,)
    panel_max,  # (panels, T)
    panel_sum,
    panel_dot,  # or None
    logps,  # (T,)
    lse,  # (T,)
    entropy,  # (T,) or None
    top1,  # (T,) uint8, or None
    exp_logits,  # (T, V) or None: the entries of the labels are written
    shift,  # (T,) or None: replaced by the log-sum-exp in the rows to redo
    redo_mask,  # (T,) uint8 or None, written
    row_scale,  # (T,) or None, written: row_scale * exp_logits = dlogits
    T,
    V,
    panels,
    stride_exp,
    logit_scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the partial sums of the panels; after TRAIN, finish the rows of exp_logits."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < T
    label = tl.load(labels + rows, mask=mask, other=IGNORE_INDEX)
    valid = label != IGNORE_INDEX
    running_max = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    running_dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(0, panels, BLOCK_P):
        panel = first + tl.arange(0, BLOCK_P)
        inside = (panel < panels)[:, None] & mask[None, :]
        offsets = panel[:, None].to(tl.int64) * T + rows[None, :]
        part_max = tl.load(panel_max + offsets, mask=inside, other=float("-inf"))
        part_sum = tl.load(panel_sum + offsets, mask=inside, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, axis=0))
        row_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay, part_decay = tl.exp(running_max - row_max), tl.exp(part_max - row_max[None, :])
        if panel_dot is not None:
            part_dot = tl.load(panel_dot + offsets, mask=inside, other=0.0)
            max_change = tl.where(running_max == float("-inf"), 0.0, running_max - row_max)
            part_change = tl.where(part_max == float("-inf"), 0.0, part_max - row_max[None, :])
            part_dot = (part_dot + part_change * part_sum) * part_decay
            running_dot = (running_dot + max_change * running_sum) * decay + tl.sum(
                part_dot, axis=0
            )
        running_sum = running_sum * decay + tl.sum(part_sum * part_decay, axis=0)
        running_max = new_max

    log_sum = tl.log(running_sum)
    row_lse = running_max + log_sum
    target_logit = tl.load(target_logits + rows, mask=mask & valid, other=0.0)
    # The maximum is subtracted first: both may be large, their difference is what must be exact.
    logp = (target_logit - running_max) - log_sum
    tl.store(logps + rows, tl.where(valid, logp, 0.0), mask=mask)
    tl.store(lse + rows, tl.where(valid, row_lse, 0.0), mask=mask)
    if panel_dot is not None:
        row_entropy = log_sum - running_dot / running_sum
        tl.store(entropy + rows, tl.where(valid, row_entropy, 0.0), mask=mask)
        tl.store(top1 + rows, (valid & (target_logit >= running_max)).to(tl.uint8), mask=mask)
    if exp_logits is not None:
        distance = row_lse - tl.load(shift + rows, mask=mask, other=0.0)
        redo = valid & ((tl.abs(distance) < RANGE) == 0)  # a NaN distance is out of range, too
        distance = tl.where(redo, 0.0, distance)
        tl.store(shift + rows, row_lse, mask=mask & redo)
        tl.store(redo_mask + rows, redo.to(tl.uint8), mask=mask)
        scale = tl.where(valid, -logit_scale * tl.exp(-distance), 0.0)
        tl.store(row_scale + rows, scale, mask=mask)
        label_entry = -one_minus_exp(tl.minimum(logp, 0.0)) * tl.exp(distance)
        if softcap is not None:
            label_entry *= cap_slope(target_logit, softcap)
        tl.store(
            exp_logits + rows.to(tl.int64) * stride_exp + label,
            label_entry.to(exp_logits.dtype.element_ty),
            mask=mask & (label >= 0) & (label < V),
        )


class TrainBuffers(NamedTuple):
    """Outputs of TRAIN, from which `dlogits.py` makes the gradient."""

    exp_logits: Tensor  # (T, V), rows of unit stride: e^(logits - shift) but in labels' columns
    shift: Tensor  # (T,) fp32 estimate of the log-sum-exp, replaced by it in the rows to redo
    row_scale: Tensor  # (T,) fp32: row_scale_t * exp_logits_t = dlogits_t


def linear_softmax_fwd(
    hidden: Tensor,  # (T, D)
    head: "Head",
    labels: Tensor,  # (T,)
    *,
    full: bool,
    train: TrainBuffers | None = None,
) -> TokenStats:
    """Statistics of checked inputs, and the `train` buffers; entropy and top-1 only when `full`."""
    T, V = hidden.shape[0], head.weight.shape[0]
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
    target_logits = fp32(T).fill_(float("nan"))  # a label outside [0, V) stays visible
    panel_max, panel_sum = fp32((2, panels, T))
    panel_dot = fp32((panels, T)) if full else None
    exp_logits, shift, row_scale = (None, None, None) if train is None else train
    redo_mask = None if train is None else torch.empty(T, dtype=torch.uint8, device=hidden.device)
    shared = {
        "labels": labels,
        "target_logits": target_logits,
        "panel_max": panel_max,
        "panel_sum": panel_sum,
        "panel_dot": panel_dot,
        "exp_logits": exp_logits,
        "shift": shift,
        "stride_exp": 0 if exp_logits is None else exp_logits.stride(0),
        **head_scalars(head),
    }
    arguments = {
        "bias": bias_operand(head),
        "GROUP": GROUP_T,
        **shared,
        **operands(hidden, head.weight, config),
    }
    linear_softmax_fwd_kernel[(blocks * panels,)](
        redo_mask=None, PANEL_TILES=config.panel_tiles, **arguments
    )
    merge_fwd_kernel[(triton.cdiv(T, MERGE.block_t),)](
        logps=logps,
        lse=lse,
        entropy=entropy,
        top1=None if top1 is None else top1.view(torch.uint8),
        redo_mask=redo_mask,
        row_scale=row_scale,
        T=T,
        V=V,
        panels=panels,
        BLOCK_T=MERGE.block_t,
        BLOCK_P=MERGE_PANELS,
        num_warps=MERGE.num_warps,
        enable_fp_fusion=FP_FUSION,
        **shared,
    )
    if redo_mask is not None:  # nearly always all 0: few programs, which return at once
        linear_softmax_fwd_kernel[(blocks * triton.cdiv(panels, REDO_PANELS),)](
            redo_mask=redo_mask, PANEL_TILES=REDO_PANELS * config.panel_tiles, **arguments
        )
    return TokenStats(logps, lse, entropy, top1)
