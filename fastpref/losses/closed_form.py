"""Autograd of a loss whose kernel has returned its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ClosedFormLoss(torch.autograd.Function):
    """Loss (B,) or (S,) of a kernel, with the kernel's incentives as its derivatives.

    Incentives are -dL/dz of the first log-probs and dL/dz of the second, if there are any.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, incentives: tuple[Tensor, ...], *logps: Tensor) -> Tensor:
        ctx.save_for_backward(*incentives)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as with create_graph=True; the result would be a constant
            raise RuntimeError(
                "the loss kernels have no second derivatives; use impl='reference' for them"
            )
        first, *second = ctx.saved_tensors
        return None, None, -grad_loss * first, *(grad_loss * d for d in second)
