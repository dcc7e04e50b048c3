"""The log-probs as torch knows them: one schema, shapes and derivative for all backends.

An op is opaque to tracing, so `torch.compile` keeps the graph whole, and has a fake implementation
that only needs shapes. A backend computes the numbers; the derivatives are here:

    logps[t] = log-prob of a token's label     (in `fastpref.ops.kl_op`, its KL takes that place)
    dlogp_dhidden[t] = d logps[t] / d h_t      computed forward: it needs no upstream gradient
    grad_hidden[t] = g_t * dlogp_dhidden[t]    computed backward, g the upstream gradient
    grad_weight, grad_bias                     by the backend, from cached or recomputed dlogits

A weight or bias that is wider than the hidden states is rounded to their dtype in each pass, and
its gradient is not rounded. Derivatives are those of `torch.autograd`, of first order; every other
one is refused. Only `fastpref.ops.api` calls this module; it has checked the arguments.
"""

from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import Head, ScoreSketch
from fastpref.ops.bounds import require_labels_in_range
from fastpref.ops.dispatch import backend_for
from fastpref.ops.op_parts import (
    contiguous_empty_like,
    empty_rows,
    number,
    or_empty,
    scale_rows,
)
from fastpref.ops.reference import IGNORE_INDEX, statistics_dtype
from fastpref.ops.score_sketch import sketch_rows, sketch_signs
from fastpref.utils.first_order import refuse_second_order, refuse_transforms


def linear_logps(hidden: Tensor, head: Head, labels: Tensor, impl: str) -> Tensor:
    """Log-probs (T,) by the backend for `impl`, differentiable once."""
    refuse_transforms("linear_logps", hidden, head.weight, head.bias)
    return _logps_and_scores(hidden, head, labels, 0, 0, None, impl)[0]


def linear_logps_and_scores(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    first_rejected: int,
    token_weights: Tensor | None,
    rows: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs (T,), differentiable once, and sketches (2, rows, D) of both sides' scores."""
    refuse_transforms("linear_logps_and_scores", hidden, head.weight, head.bias)
    weights = None if token_weights is None else token_weights.detach()
    size = sketch_rows(len(head.weight), rows)
    return _logps_and_scores(hidden, head, labels, size, first_rejected, weights, impl)


def _logps_and_scores(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    rows: int,  # of the sketches; 0 for none
    first_rejected: int,
    token_weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    weight, bias, logit_scale, softcap = head
    trained = torch.is_grad_enabled()
    train_hidden = trained and hidden.requires_grad
    train_head = trained and (weight.requires_grad or (bias is not None and bias.requires_grad))
    outputs: tuple[Tensor, ...] = _linear_logps(
        hidden, weight, labels, bias, token_weights, float(logit_scale), number(softcap), rows,
        first_rejected, train_hidden, train_head, impl,
    )  # fmt: skip
    return outputs[0], outputs[-1]


@torch.library.custom_op("fastpref::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    rows: int,
    first_rejected: int,
    train_hidden: bool,
    train_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, lse, and dlogp_dhidden, dlogits, row_scale and score sums or (0,) each."""
    require_labels_in_range(labels, len(weight))
    outputs = _empty_logps_outputs(hidden, weight, train_hidden, train_head, impl)
    sums, sketch = _empty_score_sums(hidden, rows), None
    if sums is not None:
        signs = None
        if rows < len(weight):
            signs = sketch_signs(len(weight), rows, hidden.device, sums.dtype)
        sketch = ScoreSketch(sums, signs, first_rejected, token_weights)
    head = Head(weight, bias, logit_scale, softcap).rounded_to(hidden.dtype)
    backend_for(impl, hidden).linear_logps_fwd(hidden, head, labels.long(), *outputs, sketch)
    logps, lse, dlogp_dhidden, dlogits, row_scale = outputs
    return (
        logps, lse, or_empty(dlogp_dhidden, hidden), or_empty(dlogits, hidden),
        or_empty(row_scale, hidden), or_empty(sums, hidden),
    )  # fmt: skip


@_linear_logps.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, rows, _, train_hidden, train_head, impl = rest
    outputs = _empty_logps_outputs(hidden, weight, train_hidden, train_head, impl)
    return tuple(or_empty(x, hidden) for x in (*outputs, _empty_score_sums(hidden, rows)))


def _save_logps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden, weight, labels, bias, _, logit_scale, softcap, _, _, train_hidden, train_head, impl,
    ) = inputs  # fmt: skip
    _, lse, dlogp_dhidden, dlogits, row_scale, sums = output
    ctx.logit_scale, ctx.softcap, ctx.impl = logit_scale, softcap, impl
    ctx.mark_non_differentiable(lse, dlogp_dhidden, dlogits, row_scale, sums)
    ctx.set_materialize_grads(False)
    saved_for_head = (hidden, weight, bias, lse, dlogits, row_scale) if train_head else (None,) * 6
    ctx.save_for_backward(labels, dlogp_dhidden if train_hidden else None, *saved_for_head)


def _logps_bwd(ctx: Any, grad_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_order("linear_logps")
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = grad_bias = None
    if grad_logps is not None:
        labels, dlogp_dhidden, hidden, weight, bias, lse, dlogits, row_scale = ctx.saved_tensors
        grad_logps = grad_logps.masked_fill(labels == IGNORE_INDEX, 0.0)
        # The head comes first: grad_hidden would be alive during its temporaries.
        if need_weight or need_bias:
            grad_weight, grad_bias = _linear_logps_bwd(
                grad_logps, hidden, weight, labels, bias, ctx.logit_scale, ctx.softcap, lse,
                dlogits, row_scale, need_weight, need_bias, ctx.impl,
            )  # fmt: skip
        if need_hidden:
            grad_hidden = scale_rows(dlogp_dhidden, grad_logps)
    return (
        grad_hidden, grad_weight if need_weight else None, None, grad_bias if need_bias else None,
        *(None,) * 8,
    )  # fmt: skip


_linear_logps.register_autograd(_logps_bwd, setup_context=_save_logps)


@torch.library.custom_op("fastpref::linear_logps_bwd", mutates_args=())
def _linear_logps_bwd(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,
    dlogits: Tensor,
    row_scale: Tensor,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, or (0,) for one that is not needed."""
    head = Head(weight, bias, logit_scale, softcap).rounded_to(hidden.dtype)
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    cached = dlogits.dim() == 2
    backend_for(impl, hidden).linear_logps_bwd(
        grad_logps, hidden, head, labels.long(), lse, dlogits if cached else None,
        row_scale if cached else None, grad_weight, grad_bias,
    )  # fmt: skip
    return or_empty(grad_weight, hidden), or_empty(grad_bias, hidden)


@_linear_logps_bwd.register_fake
def _(grad_logps: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, bias, *_, need_weight, need_bias, _ = rest
    parameters = (weight if need_weight else None, bias if need_bias else None)
    return tuple(hidden.new_empty(0) if x is None else torch.empty_like(x) for x in parameters)


def _empty_logps_outputs(
    hidden: Tensor, weight: Tensor, train_hidden: bool, train_head: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logps, lse, dlogp_dhidden, dlogits and row_scale; None for those that are not needed."""
    logps, lse = empty_rows(hidden, 2)
    dlogp_dhidden = contiguous_empty_like(hidden) if train_hidden else None
    dlogits = backend_for(impl, hidden).new_dlogits_cache(hidden, weight) if train_head else None
    row_scale = None if dlogits is None else torch.empty_like(lse)
    return logps, lse, dlogp_dhidden, dlogits, row_scale


def _empty_score_sums(hidden: Tensor, rows: int) -> Tensor | None:
    """Sums (2, rows, D) of the chosen and rejected scores, or None for 0 rows."""
    if not rows:
        return None
    return hidden.new_empty(2, rows, hidden.shape[1], dtype=statistics_dtype(hidden))
