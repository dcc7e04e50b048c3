"""The elementwise operations that `fastpref.trunk` calls; one op a file has formulas and costs."""

from torch import Tensor

from fastpref_kernels.gated_mlp import gated, gated_backward
from fastpref_kernels.residual_norm import residual_rms_norm
from fastpref_kernels.rms_norm import MAX_WIDTH, rms_norm, rms_norm_backward
from fastpref_kernels.rotary import rotate

__all__ = [
    "MAX_WIDTH",
    "gated",
    "gated_backward",
    "residual_rms_norm",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "rotate_backward",
]


def rotate_backward(grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the gradients of `rotate`'s results into those of its inputs, in place."""
    rotate(grad_query, grad_key, cos, sin, backward=True)
