"""KL(reference || policy) of every token over the whole vocabulary, from both heads in one loop.

    KL_t = sum_v q_tv (log q_tv - log p_tv),    p, q = softmax of policy and reference logits
    dKL_t / dlogits_tv = p_tv - q_tv            by the policy's logits

Both models' tiles of a column block are in registers together, so the difference of two logits is
never rounded; p - q is also formed in fp32 and is exactly 0 where the two models agree.

GEMMs over a head: 2 for the value; 1 more for dkl_dhidden, computed forward and scaled backward; 3
more for a trained head. For dkl_dhidden the logits of both models are kept in fp32 for a chunk of
rows until their log-sum-exps are known, which takes less time than to compute them again. Extra
memory: 20 bytes a token and panel of 2048 columns; with dkl_dhidden about KL_CHUNK_BYTES and T x D.
"""

# mypy: allow-untyped-defs
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import DLOGITS_OF_KL, FP_FUSION, GROUP_T, MERGE_KL
from fastpref_kernels.common.gemm_tile import (
    chain_rule,
    column_quarters,
    finish_logits,
    grouped_tile,
    matmul_tile,
    store_columns,
)
from fastpref_kernels.common.launch import (
    aligned_rows,
    dense_rows,
    head_scalars,
    launching_on,
    pair_config,
    pair_operands,
)
from fastpref_kernels.linear_logps import head_gradients, rows_per_chunk, scale_rows

if TYPE_CHECKING:
    from fastpref.ops.backend import Head

# Both models' logits and p - q: 896 rows of 128k columns in bf16, so that the weights, which every
# chunk reads, are no longer what its products wait for.
KL_CHUNK_BYTES = 1 << 30


@triton.jit
def linear_kl_fwd_kernel(
    hidden,  # (T, D)
    weight,  # (V, D)
    ref_hidden,  # (T, D_REF)
    ref_weight,  # (V, D_REF)
    panels_out,  # (5, panels, T): max and sum of the policy, of the reference, and dot
    p_logits_out,  # (T, V) fp32, written, or None
    q_logits_out,  # (T, V) fp32, written, or None
    T,
    V,
    D,
    D_REF,
    stride_h,
    stride_w,
    stride_rh,
    stride_rw,
    stride_logits,
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
    mask = rows < T
    p_max = tl.full((BLOCK_T,), -1e30, dtype=tl.float32)  # finite: -inf - -inf would be NaN
    q_max = tl.full((BLOCK_T,), -1e30, dtype=tl.float32)
    p_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    # Sum of e^q_shifted (q_shifted - p_shifted), where shifted logits are relative to the maximum.
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)

    first_tile = panel * PANEL_TILES
    for tile in range(first_tile, tl.minimum(first_tile + PANEL_TILES, tiles)):
        p_acc = matmul_tile(
            hidden, weight, row, tile * BLOCK_V, T, V, D, stride_h, stride_w,
            BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
        )  # fmt: skip
        q_acc = matmul_tile(
            ref_hidden, ref_weight, row, tile * BLOCK_V, T, V, D_REF, stride_rh, stride_rw,
            BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
        )  # fmt: skip
        p_quarters = column_quarters(p_acc, BLOCK_T, BLOCK_V)
        q_quarters = column_quarters(q_acc, BLOCK_T, BLOCK_V)
        for quarter in tl.static_range(4):
            col = tile * BLOCK_V + quarter * (BLOCK_V // 4)
            if col < V:
                p_logits = finish_logits(
                    p_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
                )
                q_logits = finish_logits(
                    q_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
                )
                if p_logits_out is not None:
                    store_columns(
                        p_logits_out, p_logits, rows, mask[:, None], col, V, stride_logits,
                        BLOCK_V // 4,
                    )  # fmt: skip
                    store_columns(
                        q_logits_out, q_logits, rows, mask[:, None], col, V, stride_logits,
                        BLOCK_V // 4,
                    )  # fmt: skip
                p_new = tl.maximum(p_max, tl.max(p_logits, axis=1))
                q_new = tl.maximum(q_max, tl.max(q_logits, axis=1))
                # Past V: q_exp = 0, times the difference of two finite numbers is 0.
                p_shifted = tl.maximum(p_logits - p_new[:, None], -1e30)
                q_shifted = tl.maximum(q_logits - q_new[:, None], -1e30)
                q_exp = tl.exp(q_shifted)
                p_decay, q_decay = tl.exp(p_max - p_new), tl.exp(q_max - q_new)
                # New maxima change every earlier difference by the same amount.
                change = (q_max - q_new) - (p_max - p_new)
                dot = (dot + change * q_sum) * q_decay + tl.sum(
                    q_exp * (q_shifted - p_shifted), axis=1
                )
                p_sum = p_sum * p_decay + tl.sum(tl.exp(p_shifted), axis=1)
                q_sum = q_sum * q_decay + tl.sum(q_exp, axis=1)
                p_max, q_max = p_new, q_new

    size = tl.cast(panels, tl.int64) * T
    offsets = panel.to(tl.int64) * T + rows
    tl.store(panels_out + offsets, p_max, mask=mask)
    tl.store(panels_out + size + offsets, p_sum, mask=mask)
    tl.store(panels_out + 2 * size + offsets, q_max, mask=mask)
    tl.store(panels_out + 3 * size + offsets, q_sum, mask=mask)
    tl.store(panels_out + 4 * size + offsets, dot, mask=mask)


@triton.jit
def merge_kl_kernel(
    panels_in,  # (5, panels, T)
    kl,  # (T,)
    lse,  # (T,) of the policy
    ref_lse,  # (T,)
    T,
    panels,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < T
    size = tl.cast(panels, tl.int64) * T
    p_max = tl.load(panels_in + rows, mask=mask, other=0.0)
    p_sum = tl.load(panels_in + size + rows, mask=mask, other=1.0)
    q_max = tl.load(panels_in + 2 * size + rows, mask=mask, other=0.0)
    q_sum = tl.load(panels_in + 3 * size + rows, mask=mask, other=1.0)
    dot = tl.load(panels_in + 4 * size + rows, mask=mask, other=0.0)
    for panel in range(1, panels):
        offsets = tl.cast(panel, tl.int64) * T + rows
        p_part_max = tl.load(panels_in + offsets, mask=mask, other=0.0)
        p_part_sum = tl.load(panels_in + size + offsets, mask=mask, other=1.0)
        q_part_max = tl.load(panels_in + 2 * size + offsets, mask=mask, other=0.0)
        q_part_sum = tl.load(panels_in + 3 * size + offsets, mask=mask, other=1.0)
        part_dot = tl.load(panels_in + 4 * size + offsets, mask=mask, other=0.0)
        p_new, q_new = tl.maximum(p_max, p_part_max), tl.maximum(q_max, q_part_max)
        q_decay, q_part_decay = tl.exp(q_max - q_new), tl.exp(q_part_max - q_new)
        change = (q_max - q_new) - (p_max - p_new)
        part_change = (q_part_max - q_new) - (p_part_max - p_new)
        dot = (dot + change * q_sum) * q_decay
        dot += (part_dot + part_change * q_part_sum) * q_part_decay
        q_sum = q_sum * q_decay + q_part_sum * q_part_decay
        p_sum = p_sum * tl.exp(p_max - p_new) + p_part_sum * tl.exp(p_part_max - p_new)
        p_max, q_max = p_new, q_new
    p_log_sum, q_log_sum = tl.log(p_sum), tl.log(q_sum)
    tl.store(kl + rows, dot / q_sum - q_log_sum + p_log_sum, mask=mask)
    tl.store(lse + rows, p_max + p_log_sum, mask=mask)
    tl.store(ref_lse + rows, q_max + q_log_sum, mask=mask)


@triton.jit
def logits_to_dlogits_kernel(
    p_logits,  # (T, V) fp32
    q_logits,  # (T, V) fp32
    lse,  # (T,)
    ref_lse,  # (T,)
    dlogits,  # (T, V), written: d KL / d (hidden @ weight.T)
    V,
    stride_logits,
    stride_dlogits,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < V
    p = tl.load(p_logits + row * stride_logits + columns, mask=mask, other=0.0)
    q = tl.load(q_logits + row * stride_logits + columns, mask=mask, other=0.0)
    grad = tl.exp(p - tl.load(lse + row)) - tl.exp(q - tl.load(ref_lse + row))
    values = chain_rule(grad, p, logit_scale, softcap)
    pointers = dlogits + row * stride_dlogits + columns
    tl.store(pointers, values.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit
def kl_dlogits_kernel(
    hidden,  # (T, D)
    weight,  # (V, D), some rows of the head
    ref_hidden,  # (T, D_REF)
    ref_weight,  # (V, D_REF), the same rows
    lse,  # (T,)
    ref_lse,  # (T,)
    dlogits,  # (T, V), written: d KL / d (hidden @ weight.T)
    T,
    V,
    D,
    D_REF,
    stride_h,
    stride_w,
    stride_rh,
    stride_rw,
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
    p_acc = matmul_tile(
        hidden, weight, row, tile * BLOCK_V, T, V, D, stride_h, stride_w,
        BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
    )  # fmt: skip
    q_acc = matmul_tile(
        ref_hidden, ref_weight, row, tile * BLOCK_V, T, V, D_REF, stride_rh, stride_rw,
        BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA, UPCAST,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    p_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    q_lse = tl.load(ref_lse + rows, mask=row_mask, other=0.0)
    p_quarters = column_quarters(p_acc, BLOCK_T, BLOCK_V)
    q_quarters = column_quarters(q_acc, BLOCK_T, BLOCK_V)
    for quarter in tl.static_range(4):
        col = tile * BLOCK_V + quarter * (BLOCK_V // 4)
        p_logits = finish_logits(
            p_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
        )
        q_logits = finish_logits(
            q_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
        )
        grad = tl.exp(p_logits - p_lse[:, None]) - tl.exp(q_logits - q_lse[:, None])
        values = chain_rule(grad, p_logits, logit_scale, softcap)
        store_columns(
            dlogits, values, rows, row_mask[:, None], col, V, stride_dlogits, BLOCK_V // 4
        )


def linear_kl_fwd(
    hidden: Tensor,  # (T, D)
    head: "Head",
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    kl: Tensor,  # (T,), written
    lse: Tensor,  # (T,), written, of the policy
    ref_lse: Tensor,  # (T,), written
    dkl_dhidden: Tensor | None,  # (T, D), written
) -> None:
    """KL of each token in nats, both log-sum-exps and, chunk by chunk of p - q, dkl_dhidden."""
    hidden, head = dense_rows(hidden), head._replace(weight=dense_rows(head.weight))
    ref_hidden, ref_weight = dense_rows(ref_hidden), dense_rows(ref_weight)
    T, V = hidden.shape[0], head.weight.shape[0]
    if T == 0:
        return
    with launching_on(hidden):
        if dkl_dhidden is None:
            _statistics(hidden, head, ref_hidden, ref_weight, kl, lse, ref_lse, None)
            return
        rows = rows_per_chunk(V, 2 * 4 + hidden.element_size(), KL_CHUNK_BYTES)
        logits = hidden.new_empty((2, min(rows, T), V), dtype=torch.float32)
        buffer = aligned_rows(min(rows, T), V, hidden)
        for start in range(0, T, rows):
            part = slice(start, min(start + rows, T))
            size = part.stop - start
            _statistics(
                hidden[part], head, ref_hidden[part], ref_weight, kl[part], lse[part],
                ref_lse[part], logits[:, :size],
            )  # fmt: skip
            dlogits = buffer[:size]
            logits_to_dlogits_kernel[(triton.cdiv(V, DLOGITS_OF_KL.block_t), size)](
                logits[0], logits[1], lse[part], ref_lse[part], dlogits, V,
                stride_logits=V, stride_dlogits=dlogits.stride(0), **head_scalars(head),
                BLOCK=DLOGITS_OF_KL.block_t, num_warps=DLOGITS_OF_KL.num_warps,
                enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
            torch.mm(dlogits, head.weight, out=dkl_dhidden[part])


def _statistics(
    hidden: Tensor,  # (T, D)
    head: "Head",
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    kl: Tensor,  # (T,), written
    lse: Tensor,  # (T,), written, of the policy
    ref_lse: Tensor,  # (T,), written
    logits: Tensor | None,  # (2, T, V) fp32, written: those of policy and reference
) -> None:
    """KL of each token, both log-sum-exps, and on request the logits."""
    T, V = hidden.shape[0], head.weight.shape[0]
    config = pair_config(hidden)
    panels = triton.cdiv(triton.cdiv(V, config.block_v), config.panel_tiles)
    partials = torch.empty((5, panels, T), dtype=torch.float32, device=hidden.device)
    linear_kl_fwd_kernel[(triton.cdiv(T, config.block_t) * panels,)](
        panels_out=partials,
        p_logits_out=None if logits is None else logits[0],
        q_logits_out=None if logits is None else logits[1],
        stride_logits=V,
        PANEL_TILES=config.panel_tiles,
        GROUP=GROUP_T,
        **head_scalars(head),
        **pair_operands(hidden, head.weight, ref_hidden, ref_weight, config),
    )
    merge_kl_kernel[(triton.cdiv(T, MERGE_KL.block_t),)](
        partials, kl, lse, ref_lse, T, panels,
        BLOCK_T=MERGE_KL.block_t, num_warps=MERGE_KL.num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


def linear_kl_bwd(
    grad_kl: Tensor,  # (T,) upstream gradient
    hidden: Tensor,  # (T, D)
    head: "Head",
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    lse: Tensor,  # (T,)
    ref_lse: Tensor,  # (T,)
    grad_weight: Tensor,  # (V, D), written
) -> None:
    """Gradient of a trained head, from recomputed p - q."""
    hidden, head = dense_rows(hidden), head._replace(weight=dense_rows(head.weight))
    ref_hidden, ref_weight = dense_rows(ref_hidden), dense_rows(ref_weight)

    def recompute(columns: slice, panel: Tensor) -> Tensor:
        part, ref_part = head.rows(columns), ref_weight[columns]
        return kl_dlogits(hidden, part, ref_hidden, ref_part, lse, ref_lse, panel)

    with launching_on(hidden):
        scaled_hidden, V = scale_rows(hidden, grad_kl), head.weight.shape[0]
        head_gradients(scaled_hidden, grad_kl, V, recompute, grad_weight, None)


def kl_dlogits(
    hidden: Tensor,  # (T, D)
    head: "Head",  # some rows of the policy's head
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref), the same rows of the reference's head
    lse: Tensor,  # (T,)
    ref_lse: Tensor,  # (T,)
    dlogits: Tensor,  # (T, V), written
) -> Tensor:
    """d KL / d (hidden @ weight.T) for some rows of both heads; returns `dlogits`."""
    T, V = dlogits.shape
    if T > 0:
        config = pair_config(hidden)
        kl_dlogits_kernel[(triton.cdiv(T, config.block_t) * triton.cdiv(V, config.block_v),)](
            lse=lse,
            ref_lse=ref_lse,
            dlogits=dlogits,
            stride_dlogits=dlogits.stride(0),
            GROUP=GROUP_T,
            **head_scalars(head),
            **pair_operands(hidden, head.weight, ref_hidden, ref_weight, config),
        )
    return dlogits
