"""Residual addition with the norms on both sides of it, forward; the backward pass is RMSNorm's.

    total = x + N(update)      normalized = M(total)

N and M are RMSNorms (`rms_norm.py`), and one of them may be absent. One launch: reads x and update,
writes total and normalized. A row lies in the registers of one program, in fp32. M takes total as
rounded to its dtype, which is what the backward pass will read.

Without N, total is written over update: a program reads its rows before it writes them.
"""

# mypy: allow-untyped-defs
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION
from fastpref_kernels.common.launch import launching_on
from fastpref_kernels.packed_attention import unit_stride
from fastpref_kernels.rms_norm import normalized_rows, tile_of

if TYPE_CHECKING:
    from fastpref.trunk.norm import WeightedNorm


# The compiler orders a sum by the alignment of its loads, which must not depend on the tokens.
@triton.jit(do_not_specialize=["rows"])
def residual_norm_fwd_kernel(
    x,  # (rows, D)
    update,  # (rows, D)
    update_weight,  # (D,) of N, or None
    total_weight,  # (D,) of M, or None
    total,  # (rows, D), written; update itself without N
    normalized,  # (rows, D), written, or None
    rows,
    D,
    stride_x,
    update_eps,
    update_offset,
    total_eps,
    total_offset,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)
    columns = column[None, :]
    mask = (row < rows) & (columns < D)
    values = tl.load(update + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    if update_weight is not None:
        values = normalized_rows(values, update_weight, column, D, update_eps, update_offset)
    values += tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = values.to(total.dtype.element_ty)
    tl.store(total + row * D + columns, rounded, mask=mask)
    if normalized is not None:
        values = rounded.to(tl.float32)
        result = normalized_rows(values, total_weight, column, D, total_eps, total_offset)
        tl.store(normalized + row * D + columns, result.to(normalized.dtype.element_ty), mask=mask)


def residual_rms_norm(
    x: Tensor,  # (P, D)
    update: Tensor,  # (P, D)
    output_norm: "WeightedNorm | None",
    input_norm: "WeightedNorm | None",
) -> tuple[Tensor, Tensor]:
    """x + output_norm(update) and input_norm of it, contiguous, in the dtype of x.

    At least one of the norms is there. Without `input_norm` the second result is the first.
    """
    x, update = unit_stride(x), update.contiguous()
    total = update if output_norm is None else torch.empty_like(update)
    normalized = None if input_norm is None else torch.empty_like(update)
    rows, width = update.shape
    tile = tile_of(update)
    update_weight, update_eps, update_offset = _constants(output_norm)
    total_weight, total_eps, total_offset = _constants(input_norm)
    with launching_on(x):
        residual_norm_fwd_kernel[(triton.cdiv(rows, tile["BLOCK_T"]),)](
            x=x, update=update, update_weight=update_weight, total_weight=total_weight,
            total=total, normalized=normalized, rows=rows, D=width,
            stride_x=x.stride(0),
            update_eps=update_eps, update_offset=update_offset,
            total_eps=total_eps, total_offset=total_offset,
            enable_fp_fusion=FP_FUSION, **tile,
        )  # fmt: skip
    return total, total if normalized is None else normalized


def _constants(weighted: "WeightedNorm | None") -> tuple[Tensor | None, float, float]:
    if weighted is None:
        return None, 0.0, 0.0
    weight, norm = weighted
    return weight.contiguous(), norm.eps, norm.offset
