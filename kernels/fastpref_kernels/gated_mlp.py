"""The gated activation of an MLP, forward and backward.

    product = gate σ(t) up                     silu: t = gate
                                               tanh-GELU: t = 2 √(2/π) (gate + 0.044715 gate³)
    grad_up = grad gate σ(t)      grad_gate = grad up (σ(t) + gate σ(t) σ(-t) dt/dgate)

since (1 + tanh(t / 2)) / 2 = σ(t), without its cancellation. One launch each. Forward: reads gate
and up, writes the product. Backward: reads grad, gate and up, writes grad_gate, and grad_up over
grad. gate and up may be halves of one tensor. Arithmetic is fp32, rounded once.
"""

# mypy: allow-untyped-defs
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, GATED
from fastpref_kernels.common.launch import launching_on
from fastpref_kernels.common.numerics import sigmoid
from fastpref_kernels.packed_attention import unit_stride

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def load_row_part(x, row, stride, column, mask):
    """Part of a row, fp32."""
    return tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def exponent(x, GELU: tl.constexpr):
    """t of the activation x σ(t), and dt/dx."""
    if GELU:
        square = x * x * CUBIC
        return x * (1.0 + square) * TWICE_ROOT, (1.0 + 3.0 * square) * TWICE_ROOT
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def row_and_columns(D, BLOCK: tl.constexpr):
    """Row of this program, its columns, and which of them exist."""
    blocks = tl.cdiv(D, BLOCK)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), column, column < D


@triton.jit
def gated_fwd_kernel(
    gate,  # (P, D)
    up,  # (P, D)
    product,  # (P, D), written
    D,
    stride_gate,
    stride_up,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = row_and_columns(D, BLOCK)
    x = load_row_part(gate, row, stride_gate, column, mask)
    t, _ = exponent(x, GELU)
    result = x * sigmoid(t) * load_row_part(up, row, stride_up, column, mask)
    tl.store(product + row * D + column, result.to(product.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(
    grad,  # (P, D), becomes grad_up
    gate,  # (P, D)
    up,  # (P, D)
    grad_gate,  # (P, D), written
    D,
    stride_grad,
    stride_gate,
    stride_up,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = row_and_columns(D, BLOCK)
    x = load_row_part(gate, row, stride_gate, column, mask)
    upstream = load_row_part(grad, row, stride_grad, column, mask)
    t, slope = exponent(x, GELU)
    s, rest = sigmoid(t), sigmoid(-t)
    grad_activated = upstream * load_row_part(up, row, stride_up, column, mask)
    result = grad_activated * (s + x * s * (rest * slope))
    grad_up = upstream * (x * s)
    tl.store(grad_gate + row * D + column, result.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad + row * stride_grad + column, grad_up.to(grad.dtype.element_ty), mask=mask)


def gated(
    gate: Tensor,  # (P, D)
    up: Tensor,  # (P, D)
    activation: str,
) -> Tensor:  # (P, D)
    """Product of the activated gate and `up`, contiguous."""
    gate, up = unit_stride(gate), unit_stride(up)
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    with launching_on(gate):
        gated_fwd_kernel[_grid(gate)](
            product=product, stride_gate=gate.stride(0), stride_up=up.stride(0),
            **_operands(gate, up, activation),
        )  # fmt: skip
    return product


def gated_backward(
    grad: Tensor,  # (P, D)
    gate: Tensor,  # (P, D)
    up: Tensor,  # (P, D)
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; overwrites `grad` with that of up."""
    gate, up = unit_stride(gate), unit_stride(up)
    if grad.stride(1) != 1 or grad.stride(0) < grad.shape[1]:  # rows that overlap, if expanded
        grad = grad.contiguous()
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    with launching_on(gate):
        gated_bwd_kernel[_grid(gate)](
            grad=grad, grad_gate=grad_gate, stride_grad=grad.stride(0),
            stride_gate=gate.stride(0), stride_up=up.stride(0), **_operands(gate, up, activation),
        )  # fmt: skip
    return grad_gate, grad


def _grid(gate: Tensor) -> tuple[int]:
    return (len(gate) * triton.cdiv(gate.shape[1], GATED.block_t),)


def _operands(gate: Tensor, up: Tensor, activation: str) -> dict[str, Any]:
    return {
        "gate": gate,
        "up": up,
        "D": gate.shape[1],
        "GELU": activation == "gelu_tanh",
        "BLOCK": GATED.block_t,
        "num_warps": GATED.num_warps,
        "enable_fp_fusion": FP_FUSION,
    }
