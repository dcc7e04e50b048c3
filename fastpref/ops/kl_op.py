"""`linear_kl` as torch knows it: `fastpref.ops.logps_op` explains the structure."""

from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import Head
from fastpref.ops.dispatch import backend_for
from fastpref.ops.op_parts import contiguous_empty_like, empty_rows, number, or_empty, scale_rows
from fastpref.utils.first_order import refuse_second_order, refuse_transforms


def linear_kl(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_weight: Tensor, impl: str
) -> Tensor:
    """KL(reference || policy) (T,) by the backend for `impl`, differentiable once."""
    refuse_transforms("linear_kl", hidden, head.weight)
    trained = torch.is_grad_enabled()
    outputs: tuple[Tensor, ...] = _linear_kl(
        hidden, head.weight, ref_hidden.detach(), ref_weight.detach(), float(head.logit_scale),
        number(head.softcap), trained and hidden.requires_grad,
        trained and head.weight.requires_grad, impl,
    )  # fmt: skip
    return outputs[0]


@torch.library.custom_op("fastpref::linear_kl", mutates_args=())
def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    train_hidden: bool,
    train_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, lse, ref_lse, and dkl_dhidden or (0,)."""
    head = Head(weight, None, logit_scale, softcap).rounded_to(hidden.dtype)
    kl, lse, ref_lse = empty_rows(hidden, 3)
    dkl_dhidden = contiguous_empty_like(hidden) if train_hidden else None
    backend_for(impl, hidden).linear_kl_fwd(
        hidden, head, ref_hidden, ref_weight, kl, lse, ref_lse, dkl_dhidden
    )
    return kl, lse, ref_lse, or_empty(dkl_dhidden, hidden)


@_linear_kl.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, train_hidden, _, _ = rest
    kl, lse, ref_lse = empty_rows(hidden, 3)
    dkl_dhidden = contiguous_empty_like(hidden) if train_hidden else None
    return kl, lse, ref_lse, or_empty(dkl_dhidden, hidden)


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden, weight, ref_hidden, ref_weight, logit_scale, softcap, train_hidden, train_head,
        impl,
    ) = inputs  # fmt: skip
    _, lse, ref_lse, dkl_dhidden = output
    ctx.logit_scale, ctx.softcap, ctx.impl = logit_scale, softcap, impl
    ctx.mark_non_differentiable(lse, ref_lse, dkl_dhidden)
    ctx.set_materialize_grads(False)
    saved_for_head = (hidden, weight, ref_hidden, ref_weight, lse, ref_lse)
    ctx.save_for_backward(
        dkl_dhidden if train_hidden else None, *(saved_for_head if train_head else (None,) * 6)
    )


def _kl_bwd(ctx: Any, grad_kl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_order("linear_kl")
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = None
    if grad_kl is not None:
        dkl_dhidden, *saved_for_head = ctx.saved_tensors
        if need_hidden:
            grad_hidden = scale_rows(dkl_dhidden, grad_kl)
        if need_weight:
            grad_weight = _linear_kl_bwd(
                grad_kl, *saved_for_head, ctx.logit_scale, ctx.softcap, ctx.impl
            )
    return grad_hidden, grad_weight, *(None,) * 7


_linear_kl.register_autograd(_kl_bwd, setup_context=_save_kl)


@torch.library.custom_op("fastpref::linear_kl_bwd", mutates_args=())
def _linear_kl_bwd(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    head = Head(weight, None, logit_scale, softcap).rounded_to(hidden.dtype)
    grad_weight = torch.empty_like(weight)
    backend_for(impl, hidden).linear_kl_bwd(
        grad_kl, hidden, head, ref_hidden, ref_weight, lse, ref_lse, grad_weight
    )
    return grad_weight


@_linear_kl_bwd.register_fake
def _(grad_kl: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)
