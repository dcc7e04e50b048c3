"""KL(reference || policy) of every token over the whole vocabulary, from both heads in one loop.

    KL_t = sum_v q_tv (log q_tv - log p_tv),    p, q = softmax of policy and reference logits
    dKL_t / dx_tv = p_tv - q_tv                 x the policy's logits

Both tiles of a column block sit in registers together, so the difference of two logits is never
rounded; p - q, too, is formed in fp32 and is exactly 0 where the two policies agree.

Passes over a head: 2 for the value; 3 more for the direction dKL_t / dhidden_t, computed forward
and scaled backward; 3 more for a trained head. Extra memory: 20 bytes a token and panel of 2048
columns, one chunk of (rows, V), and T x D for the direction.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, GROUP_T, MERGE_KL
from fastpref_kernels.common.gemm_tile import (
    chain_rule,
    column_quarters,
    finish_logits,
    grouped_tile,
    matmul_tile,
)
from fastpref_kernels.common.launch import (
    aligned_rows,
    dense_rows,
    launching_on,
    pair_config,
    pair_operands,
)
from fastpref_kernels.linear_logps import head_gradients, rows_per_chunk, scale_rows


@triton.jit
def linear_kl_fwd_kernel(
    hidden,  # (T, D)
    weight,  # (V, D)
    ref_hidden,  # (T, D_REF)
    ref_weight,  # (V, D_REF)
    panels_out,  # (5, panels, T): max and sum of the policy, of the reference, and the dot below
    T,
    V,
    D,
    D_REF,
    stride_h,
    stride_w,
    stride_rh,
    stride_rw,
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
    p_max = tl.full((BLOCK_T,), -1e30, dtype=tl.float32)  # finite: -inf - -inf would be NaN
    q_max = tl.full((BLOCK_T,), -1e30, dtype=tl.float32)
    p_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)  # of e^(y - q_max) and (y - q_max) - (x - p_max)

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
                x = finish_logits(
                    p_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
                )
                y = finish_logits(
                    q_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4
                )
                p_new = tl.maximum(p_max, tl.max(x, axis=1))
                q_new = tl.maximum(q_max, tl.max(y, axis=1))
                # Past V: e = 0, times the difference of two finite numbers is 0.
                x_below = tl.maximum(x - p_new[:, None], -1e30)
                y_below = tl.maximum(y - q_new[:, None], -1e30)
                e = tl.exp(y_below)
                p_decay, q_decay = tl.exp(p_max - p_new), tl.exp(q_max - q_new)
                # Moving the maxima moves every earlier difference by the same amount.
                moved = (q_max - q_new) - (p_max - p_new)
                dot = (dot + moved * q_sum) * q_decay + tl.sum(e * (y_below - x_below), axis=1)
                p_sum = p_sum * p_decay + tl.sum(tl.exp(x_below), axis=1)
                q_sum = q_sum * q_decay + tl.sum(e, axis=1)
                p_max, q_max = p_new, q_new

    rows = row + tl.arange(0, BLOCK_T)
    mask = rows < T
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
        p_m = tl.load(panels_in + offsets, mask=mask, other=0.0)
        p_s = tl.load(panels_in + size + offsets, mask=mask, other=1.0)
        q_m = tl.load(panels_in + 2 * size + offsets, mask=mask, other=0.0)
        q_s = tl.load(panels_in + 3 * size + offsets, mask=mask, other=1.0)
        d = tl.load(panels_in + 4 * size + offsets, mask=mask, other=0.0)
        p_new, q_new = tl.maximum(p_max, p_m), tl.maximum(q_max, q_m)
        old, new = tl.exp(q_max - q_new), tl.exp(q_m - q_new)
        dot = (dot + ((q_max - q_new) - (p_max - p_new)) * q_sum) * old
        dot += (d + ((q_m - q_new) - (p_m - p_new)) * q_s) * new
        q_sum = q_sum * old + q_s * new
        p_sum = p_sum * tl.exp(p_max - p_new) + p_s * tl.exp(p_m - p_new)
        p_max, q_max = p_new, q_new
    log_p, log_q = tl.log(p_sum), tl.log(q_sum)
    tl.store(kl + rows, dot / q_sum - log_q + log_p, mask=mask)
    tl.store(lse + rows, p_max + log_p, mask=mask)
    tl.store(ref_lse + rows, q_max + log_q, mask=mask)


@triton.jit
def kl_delta_kernel(
    hidden,  # (T, D)
    weight,  # (V, D), some rows of the head
    ref_hidden,  # (T, D_REF)
    ref_weight,  # (V, D_REF), the same rows
    lse,  # (T,)
    ref_lse,  # (T,)
    delta,  # (T, V), written: p - q times the derivative of the logit
    T,
    V,
    D,
    D_REF,
    stride_h,
    stride_w,
    stride_rh,
    stride_rw,
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
        local = tl.arange(0, BLOCK_V // 4)
        x = finish_logits(p_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4)
        y = finish_logits(q_quarters[quarter], col, None, V, logit_scale, softcap, BLOCK_V // 4)
        d = tl.exp(x - p_lse[:, None]) - tl.exp(y - q_lse[:, None])
        tl.store(
            delta + rows[:, None].to(tl.int64) * stride_e + (col + local)[None, :],
            chain_rule(d, x, logit_scale, softcap).to(delta.dtype.element_ty),
            mask=row_mask[:, None] & (local[None, :] < V - col),
        )


def linear_kl_fwd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    logit_scale: float,
    softcap: float | None,
    kl: Tensor,  # (T,), written
    lse: Tensor,  # (T,), written, of the policy
    ref_lse: Tensor,  # (T,), written
    direction: Tensor | None,  # (T, D), written: d KL_t / d hidden_t
) -> None:
    """KL of each token in nats, both log-sum-exps and, chunk by chunk of p - q, the direction."""
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    ref_hidden, ref_weight = dense_rows(ref_hidden), dense_rows(ref_weight)
    T, V = hidden.shape[0], weight.shape[0]
    if T == 0:
        return
    config = pair_config(hidden)
    panels = triton.cdiv(triton.cdiv(V, config.block_v), config.panel_tiles)
    partials = torch.empty((5, panels, T), dtype=torch.float32, device=hidden.device)
    with launching_on(hidden):
        linear_kl_fwd_kernel[(triton.cdiv(T, config.block_t) * panels,)](
            panels_out=partials,
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
            PANEL_TILES=config.panel_tiles,
            GROUP=GROUP_T,
            **pair_operands(hidden, weight, ref_hidden, ref_weight, config),
        )
        merge_kl_kernel[(triton.cdiv(T, MERGE_KL.block_t),)](
            partials, kl, lse, ref_lse, T, panels,
            BLOCK_T=MERGE_KL.block_t, num_warps=MERGE_KL.num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        if direction is None:
            return
        rows = rows_per_chunk(V, hidden.element_size())
        buffer = aligned_rows(min(rows, T), V, hidden)
        for start in range(0, T, rows):
            part = slice(start, min(start + rows, T))
            delta = kl_delta(
                hidden[part], weight, ref_hidden[part], ref_weight, logit_scale, softcap,
                lse[part], ref_lse[part], buffer[: part.stop - start],
            )  # fmt: skip
            torch.mm(delta, weight, out=direction[part])


def linear_kl_bwd(
    gain: Tensor,  # (T,) the upstream gradient
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,  # (T,)
    ref_lse: Tensor,  # (T,)
    grad_weight: Tensor,  # (V, D), written
) -> None:
    """The gradient of a trained head, from p - q made again."""
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    ref_hidden, ref_weight = dense_rows(ref_hidden), dense_rows(ref_weight)

    def recompute(part: slice, delta: Tensor) -> Tensor:
        return kl_delta(
            hidden, weight[part], ref_hidden, ref_weight[part], logit_scale, softcap,
            lse, ref_lse, delta,
        )  # fmt: skip

    with launching_on(hidden):
        head_gradients(
            scale_rows(hidden, gain), gain, weight.shape[0], recompute, grad_weight, None
        )


def kl_delta(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (T, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,  # (T,)
    ref_lse: Tensor,  # (T,)
    delta: Tensor,  # (T, V), written
) -> Tensor:
    """d KL / d (hidden @ weight.T) for the given rows of both heads; returns `delta`."""
    T, V = delta.shape
    if T > 0:
        config = pair_config(hidden)
        kl_delta_kernel[(triton.cdiv(T, config.block_t) * triton.cdiv(V, config.block_v),)](
            lse=lse,
            ref_lse=ref_lse,
            delta=delta,
            stride_e=delta.stride(0),
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
            GROUP=GROUP_T,
            **pair_operands(hidden, weight, ref_hidden, ref_weight, config),
        )
    return delta
