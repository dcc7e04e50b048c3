"""RMSNorm, forward and backward.

    y = x / rms(x) * (offset + weight),   rms(x) = sqrt(mean(x²) + eps)

    x̂ = x / rms(x)      ĝ = grad * (offset + weight)
    grad_x = (ĝ - x̂ mean(ĝ x̂)) / rms(x) + residual      grad_weight = sum over rows of grad x̂

One launch forward: reads x, writes y. One backward: reads grad, x and the residual, writes grad_x.
A row lies in the registers of one program, in fp32, and is rounded once; no statistics are kept.
With a gradient of the weight, each program sums over its rows into one row of partial sums, at most
NORM_PROGRAMS x D fp32 numbers, and a second launch adds these rows in their order, without atomics.
Beyond half of MAX_WIDTH, grad_x and the partial sums are two launches.

Rows are those of the last axis of (P, D) or (P, H, D), with any strides of the other axes.
"""

# mypy: allow-untyped-defs
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import (
    COLUMN_SUMS,
    FP_FUSION,
    NORM,
    NORM_PROGRAMS,
    SUMMED_COLUMNS,
)
from fastpref_kernels.common.launch import launching_on
from fastpref_kernels.packed_attention import unit_stride

if TYPE_CHECKING:
    from fastpref.trunk.norm import Norm

MAX_WIDTH = max(NORM)


@triton.jit
def row_offsets(row, H, stride_t, stride_h):
    """Offsets of rows (T, 1): row h of token t is number t H + h."""
    offset = (row // H).to(tl.int64) * stride_t + (row % H).to(tl.int64) * stride_h
    return offset[:, None]


@triton.jit
def normalized_rows(values, weight, column, D, eps, offset):
    """RMSNorm of rows (T, D) in fp32; columns beyond D are 0."""
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset
    inverse_rms = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
    return values * inverse_rms[:, None] * scale[None, :]


# The compiler orders a sum by the alignment of its loads, which must not depend on the tokens.
@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd_kernel(
    x,  # (rows / H, H, D)
    weight,  # (D,)
    out,  # (rows, D), written
    rows,
    D,
    H,
    stride_xt,
    stride_xh,
    eps,
    offset,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    values = tl.load(
        x + row_offsets(row, H, stride_xt, stride_xh) + column[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    result = normalized_rows(values, weight, column, D, eps, offset)
    places = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd_kernel(
    grad,  # (rows / H, H, D)
    x,  # (rows / H, H, D)
    weight,  # (D,)
    residual,  # (rows / H, H, D) or None
    grad_x,  # (rows, D), written, or None
    partials,  # (programs, D), written, or None
    rows,
    D,
    H,
    stride_gt,
    stride_gh,
    stride_xt,
    stride_xh,
    stride_rt,
    stride_rh,
    eps,
    offset,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_T), tl.num_programs(0)):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (row < rows)[:, None] & (column < D)[None, :]
        values = tl.load(
            x + row_offsets(row, H, stride_xt, stride_xh) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        upstream = tl.load(
            grad + row_offsets(row, H, stride_gt, stride_gh) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
        unit = values * inverse_rms
        if partials is not None:
            total += upstream * unit
        if grad_x is not None:
            # Loaded for each tile: it is in the cache, and in registers the kernel would spill.
            scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset
            scaled = upstream * scale[None, :]
            projection = (tl.sum(scaled * unit, 1) / D)[:, None]
            result = (scaled - unit * projection) * inverse_rms
            if residual is not None:
                result += tl.load(
                    residual + row_offsets(row, H, stride_rt, stride_rh) + column[None, :],
                    mask=mask, other=0.0,
                ).to(tl.float32)  # fmt: skip
            places = row.to(tl.int64)[:, None] * D + column[None, :]
            tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=mask)
    if partials is not None:
        tl.store(partials + program * D + column, tl.sum(total, 0), mask=column < D)


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    partials,  # (rows, D)
    out,  # (D,), written
    rows,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, rows, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        mask = (row < rows)[:, None] & (column < D)[None, :]
        total += tl.load(partials + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


def rms_norm(
    x: Tensor,  # (P, D) or (P, H, D)
    weight: Tensor,  # (D,)
    norm: "Norm",
) -> Tensor:
    """Normalized x, contiguous, in its dtype."""
    x = unit_stride(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tile_of(x)
    with launching_on(x):
        rms_norm_fwd_kernel[(triton.cdiv(_rows(x), tile["BLOCK_T"]),)](
            x=x, out=out, **_strides("x", x), **_operands(x, weight, norm), **tile
        )
    return out


def rms_norm_backward(
    grad: Tensor,  # as x
    x: Tensor,  # (P, D) or (P, H, D)
    weight: Tensor,  # (D,)
    norm: "Norm",
    needs_weight: bool,
    residual: Tensor | None = None,  # as x
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, contiguous, and of the weight; `residual` is added to that of x."""
    grad, x = unit_stride(grad), unit_stride(x)
    residual = None if residual is None else unit_stride(residual)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile, width = tile_of(x), x.shape[-1]
    tiles = triton.cdiv(_rows(x), tile["BLOCK_T"])
    programs = min(tiles, NORM_PROGRAMS)
    partials = grad_weight = None
    if needs_weight:
        partials = torch.empty((programs, width), dtype=torch.float32, device=x.device)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    # Sums and gradients of rows that wide do not fit into the registers together.
    apart = partials is not None and tile["BLOCK_D"] > MAX_WIDTH // 2
    launches = [(grad_x, None), (None, partials)] if apart else [(grad_x, partials)]
    with launching_on(x):
        for row_output, sum_output in launches:
            count = tiles if sum_output is None else programs
            rms_norm_bwd_kernel[(count,)](
                grad=grad, x=x, residual=residual, grad_x=row_output, partials=sum_output,
                **_strides("g", grad), **_strides("x", x), **_strides("r", residual),
                **_operands(x, weight, norm), **tile,
            )  # fmt: skip
        if grad_weight is not None:
            column_sums_kernel[(triton.cdiv(width, SUMMED_COLUMNS),)](
                partials=partials, out=grad_weight, rows=programs, D=width,
                BLOCK_T=COLUMN_SUMS.block_t, BLOCK_D=SUMMED_COLUMNS,
                num_warps=COLUMN_SUMS.num_warps, enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    return grad_x, grad_weight


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _strides(letter: str, x: Tensor | None) -> dict[str, int]:
    """Strides of tokens and heads."""
    token, head = (0, 0) if x is None else (x.stride(0), x.stride(1) if x.dim() == 3 else 0)
    return {f"stride_{letter}t": token, f"stride_{letter}h": head}


def _operands(x: Tensor, weight: Tensor, norm: "Norm") -> dict[str, Any]:
    return {
        "weight": weight.contiguous(),
        "rows": _rows(x),
        "D": x.shape[-1],
        "H": x.shape[1] if x.dim() == 3 else 1,
        "eps": norm.eps,
        "offset": norm.offset,
        "enable_fp_fusion": FP_FUSION,
    }


def tile_of(x: Tensor) -> dict[str, int]:
    """Rows, columns and warps of a program."""
    columns = triton.next_power_of_2(x.shape[-1])
    config = NORM[min(width for width in NORM if width >= columns)]
    return {"BLOCK_T": config.block_t, "BLOCK_D": columns, "num_warps": config.num_warps}
