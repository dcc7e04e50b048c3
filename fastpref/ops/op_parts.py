"""Shared parts of the ops: outputs that are not computed yet, and a scaling of rows.

An op returns tensors only, so an output that is not computed is an empty tensor, (0,).
"""

import torch
from torch import Tensor

from fastpref.ops.reference import statistics_dtype


@torch.library.custom_op("fastpref::scale_rows", mutates_args=())
def scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """scale[:, None] * rows, multiplied in the dtype of scale and rounded once, without a copy."""
    return torch.mul(rows, scale[:, None], out=torch.empty_like(rows))


@scale_rows.register_fake
def _(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(rows)


def number(value: float | None) -> float | None:
    return None if value is None else float(value)


def empty_rows(hidden: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = statistics_dtype(hidden)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(count))


def contiguous_empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # empty_like would copy the strides of x


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
