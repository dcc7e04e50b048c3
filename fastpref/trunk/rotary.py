"""Rotary position embedding of the first R of a head's D numbers, arXiv:2104.09864.

    y = x cos + rotate(x) sin,   rotate([a, b]) = [-b, a]
    grad_x = grad_y cos + rotateᵀ(grad_y sin),   rotateᵀ([a, b]) = [b, -a]

with halves a and b of R / 2 numbers each, as in Hugging Face's layers. Sine and cosine of both
numbers of a pair are equal, so that the backward pass is the rotation by -sin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.trunk.dispatch import kernels_for


def rotate(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    cos: Tensor,  # (P, R)
    sin: Tensor,  # (P, R)
) -> None:
    """Rotate queries and keys in place."""
    if (kernels := kernels_for(query)) is not None:
        kernels.rotate(query, key, cos, sin)
        return
    for x in (query, key):
        _rotate(x, cos, sin, 1)


def rotate_backward(grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the gradients of `rotate`'s results into those of its inputs, in place."""
    if (kernels := kernels_for(grad_query)) is not None:
        kernels.rotate_backward(grad_query, grad_key, cos, sin)
        return
    for grad in (grad_query, grad_key):
        _rotate(grad, cos, sin, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.float32), cos.dtype)
    half = cos.shape[-1] // 2
    a, b = x[..., :half], x[..., half : 2 * half]
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    c, s = cos[:, None, :half].to(dtype), sin[:, None, :half].to(dtype)
    # In place, in fewer passes than new tensors would need.
    a_sin = wide_a * s
    wide_a.mul_(c).addcmul_(wide_b, s, value=-sign)
    wide_b.mul_(c).add_(a_sin, alpha=sign)
    if dtype != x.dtype:
        a.copy_(wide_a)
        b.copy_(wide_b)
