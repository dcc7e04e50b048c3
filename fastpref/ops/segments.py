"""Sums over the segments of a packed batch, with all their derivatives."""

from typing import Any

import torch
from torch import Tensor

from fastpref import logps
from fastpref.logps import segment_positions


def segment_sum(
    values: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,), rising from 0 to T
) -> Tensor:  # (S,)
    """`logps.segment_sum`, which is linear; but `torch.segment_reduce` has one derivative alone."""
    if torch.compiler.is_compiling():  # which traces no forward mode
        return logps.segment_sum(values, cu_seqlens)
    sums: Tensor = _SegmentSum.apply(values, cu_seqlens)
    return sums


class _SegmentSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return logps.segment_sum(values, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, cu_seqlens = inputs
        ctx.save_for_backward(cu_seqlens)
        ctx.save_for_forward(cu_seqlens)
        ctx.tokens = len(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        segment_ids, _ = segment_positions(cu_seqlens, ctx.tokens)
        return grad.index_select(0, segment_ids), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (cu_seqlens,) = ctx.saved_tensors
        return segment_sum(tangent, cu_seqlens)
