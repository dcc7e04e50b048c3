"""Derivatives that an op with a backward pass of its own does not have: refused, never zero.

`torch.autograd.function.once_differentiable` is silent where the upstream gradient is a constant,
as in `torch.autograd.grad(logps.sum(), hidden, create_graph=True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_second_order(op: str, remedy: str = "use impl='reference'") -> None:
    """Raise RuntimeError in a backward pass whose result is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: its gradient has no derivative, so it cannot be computed with "
            f"create_graph=True; {remedy}"
        )


def refuse_transforms(
    op: str, *operands: Tensor | None, remedy: str = "use impl='reference'"
) -> None:
    """Raise RuntimeError for operands of `torch.func` transforms and of forward-mode autograd."""
    if any(operand is not None and _is_transformed(operand) for operand in operands):
        raise RuntimeError(
            f"{op}: has the gradient of torch.autograd alone, no torch.func transform (grad, jvp, "
            f"vmap) and no forward mode; {remedy}"
        )


def _is_transformed(operand: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return _transforms_run()
    if torch._C._functorch.is_functorch_wrapped_tensor(operand):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(operand).tangent is not None


def _transforms_run() -> bool:
    """Whether a transform is active while a graph is traced, which guards on that."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


# As `torch.compiler.assume_constant_result` does, which would import the compiler for it.
_transforms_run._dynamo_marked_constant = True  # type: ignore[attr-defined]
