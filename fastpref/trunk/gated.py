"""The gated activation of an MLP: product = act(gate) * up.

grad_up = grad * act(gate)        grad_gate = grad * up * act'(gate)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fastpref.trunk.dispatch import kernels_for

Activation = Literal["silu", "gelu_tanh"]


def gated(
    gate: Tensor,  # (P, I)
    up: Tensor,  # (P, I)
    activation: Activation,
) -> Tensor:  # (P, I)
    """Product of the activated gate and `up`."""
    if (kernels := kernels_for(gate)) is not None:
        product: Tensor = kernels.gated(gate, up, activation)
        return product
    return _activate(gate, activation).mul_(up)


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; overwrites `grad`."""
    if (kernels := kernels_for(gate)) is not None:
        grads: tuple[Tensor, Tensor] = kernels.gated_backward(grad, gate, up, activation)
        return grads
    grad_up = _activate(gate, activation).mul_(grad)
    grad_activated = grad.mul_(up)
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad_activated, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh")
    return grad_gate, grad_up


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    return silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
