"""RMSNorm: y = x / rms(x) * (offset + weight), rms(x) = sqrt(mean(x²) + eps) over the last axis.

Computed in fp32 for half-precision inputs, and rounded once. Nothing is saved for the backward
pass but x:

    x̂ = x / rms(x)      ĝ = grad_y * (offset + weight)
    grad_x = (ĝ - x̂ mean(ĝ x̂)) / rms(x)        grad_weight = sum over tokens of grad_y x̂
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.trunk.dispatch import kernels_for


class Norm(NamedTuple):
    """Constants of an RMSNorm."""

    eps: float
    offset: float  # 1 where the module stores weight - 1, as Gemma's do


WeightedNorm = tuple[Tensor, Norm]  # weight (D,) and constants


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """Normalized x, in its dtype."""
    if (kernels := _kernels(x)) is not None:
        result: Tensor = kernels.rms_norm(x, weight, norm)
        return result
    return _normalized(x, weight, norm).to(x.dtype)


def residual_rms_norm(
    x: Tensor,  # (P, D)
    update: Tensor,  # (P, D)
    output_norm: WeightedNorm | None,
    input_norm: WeightedNorm | None,
) -> tuple[Tensor, Tensor]:
    """Residual sum x + output_norm(update), and input_norm of the sum as rounded.

    A norm that is None leaves its input as it is. Without `output_norm` the sum overwrites
    `update`.
    """
    if output_norm is None and input_norm is None:
        update += x
        return update, update
    if (kernels := _kernels(x)) is not None:
        sums: tuple[Tensor, Tensor] = kernels.residual_rms_norm(x, update, output_norm, input_norm)
        return sums
    if output_norm is None:
        total = update.add_(x)
    else:
        total = _normalized(update, *output_norm).add_(x).to(x.dtype)
    return total, total if input_norm is None else rms_norm(total, *input_norm)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    needs_weight: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the weight; `residual` is added to that of x."""
    if (kernels := _kernels(x)) is not None:
        grads: tuple[Tensor, Tensor | None] = kernels.rms_norm_backward(
            grad, x, weight, norm, needs_weight, residual
        )
        return grads
    wide, grad = _wide(x), _wide(grad)
    inverse_rms = _inverse_rms(wide, norm)
    unit = wide * inverse_rms
    grad_weight = None
    if needs_weight:
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
    grad_unit = grad * _scale(weight, norm, wide)
    projection = (grad_unit * unit).mean(-1, keepdim=True)
    grad_x = grad_unit.sub_(unit.mul_(projection)).mul_(inverse_rms)
    if residual is not None:
        grad_x += residual
    return grad_x.to(x.dtype), grad_weight


def _kernels(x: Tensor) -> Any | None:
    kernels = kernels_for(x)
    return None if kernels is None or x.shape[-1] > kernels.MAX_WIDTH else kernels


def _normalized(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """A new tensor, not rounded to half precision."""
    wide = _wide(x)
    return (wide * _inverse_rms(wide, norm)).mul_(_scale(weight, norm, wide))


def _inverse_rms(x: Tensor, norm: Norm) -> Tensor:
    # The norm makes one pass, without a tensor of squares.
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(norm.eps).rsqrt_()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(weight: Tensor, norm: Norm, like: Tensor) -> Tensor:
    scale = weight.to(like.dtype)
    return scale + norm.offset if norm.offset else scale
