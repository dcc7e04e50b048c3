"""Sums of the scores of a chunk of tokens, folded to a few rows of the vocabulary.

    folded[t, j] = sum over v = j mod rows of sign[v] dlogits[t, v]        one read of dlogits
    sums         += (folded * row_scale)^T hidden                          2 T rows D FLOPs

`fastpref.ops.score_sketch` defines the sketch. Extra memory: (T, rows) of folded dlogits in the
input dtype, summed in fp32 and rounded once.
"""

# mypy: allow-untyped-defs
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, IGNORE_INDEX, SCORE_FOLD

if TYPE_CHECKING:
    from fastpref.ops.backend import ScoreSketch


@triton.jit
def fold_kernel(
    dlogits,  # (T, V)
    signs,  # (blocks, rows)
    folded,  # (T, rows), written
    V,
    rows,
    stride_dlogits,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < rows
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, rows):
        inside = mask & (start + column < V)
        sign = tl.load(signs + start + column, mask=inside, other=0.0)
        entry = tl.load(dlogits + token * stride_dlogits + start + column, mask=inside, other=0.0)
        total += sign * entry.to(tl.float32)
    tl.store(folded + token * rows + column, total.to(folded.dtype.element_ty), mask=mask)


def fold(
    dlogits: Tensor,  # (T, V), rows of unit stride
    signs: Tensor,  # (blocks, rows)
) -> Tensor:  # (T, rows)
    """Sum the signed columns whose indices are equal mod `rows`."""
    T, V = dlogits.shape
    rows = signs.shape[1]
    folded = dlogits.new_empty(T, rows)
    fold_kernel[(T, triton.cdiv(rows, SCORE_FOLD.block_t))](
        dlogits=dlogits,
        signs=signs,
        folded=folded,
        V=V,
        rows=rows,
        stride_dlogits=dlogits.stride(0),
        BLOCK=SCORE_FOLD.block_t,
        num_warps=SCORE_FOLD.num_warps,
        enable_fp_fusion=FP_FUSION,
    )
    return folded


def add_scores(
    sketch: "ScoreSketch",
    dlogits: Tensor,  # (n, V), of the tokens of `part`
    row_scale: Tensor,  # (T,)
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    part: slice,
) -> None:
    """Add the scores of a chunk of tokens to the sums of a sketch."""
    folded = dlogits if sketch.signs is None else fold(dlogits, sketch.signs)
    for sums, tokens in sketch.sides(part):
        scale = row_scale[tokens]
        if sketch.token_weights is not None:
            scale = scale * sketch.token_weights[tokens].to(scale.dtype)
        # An ignored row may hold NaN, and 0 times NaN is NaN.
        ignored = (labels[tokens] == IGNORE_INDEX)[:, None]
        rows = hidden[tokens].masked_fill(ignored, 0.0)
        rows = torch.mul(rows, scale[:, None], out=torch.empty_like(rows))
        columns = folded[tokens.start - part.start : tokens.stop - part.start].T
        sums += _mm_fp32(columns, rows)


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 results."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
