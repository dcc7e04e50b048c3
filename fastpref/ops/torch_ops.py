"""The differentiable ops as torch knows them: one schema, shapes and derivative for all backends.

Each op is opaque to tracing, so `torch.compile` keeps the graph whole, and has a fake
implementation that only needs shapes. A backend computes the numbers; the derivatives are here:

    logps[t] = log-prob of a token's label     kl[t] = KL(reference || policy) of a token
    dlogp_dhidden[t] = d logps[t] / d h_t      computed forward: it needs no upstream gradient
    grad_hidden[t] = g_t * dlogp_dhidden[t]    computed backward, g the upstream gradient
    grad_weight, grad_bias                     by the backend, from cached or recomputed dlogits

Only `fastpref.ops.api` calls this module; it has checked the arguments.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import Head, ScoreSketch
from fastpref.ops.dispatch import backend_for
from fastpref.ops.reference import IGNORE_INDEX, ScoreGeometry, TokenStats, statistics_dtype
from fastpref.ops.score_products import score_products
from fastpref.ops.score_sketch import sketch_rows, sketch_signs


def linear_logps(hidden: Tensor, head: Head, labels: Tensor, impl: str) -> Tensor:
    """Log-probs (T,) by the backend for `impl`, differentiable once."""
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
        hidden, weight, labels, bias, token_weights, float(logit_scale), _number(softcap), rows,
        first_rejected, train_hidden, train_head, impl,
    )  # fmt: skip
    return outputs[0], outputs[-1]


def token_stats(hidden: Tensor, head: Head, labels: Tensor, impl: str) -> TokenStats:
    """Statistics of each token by the backend for `impl`."""
    bias = None if head.bias is None else head.bias.detach()
    outputs: tuple[Tensor, ...] = _token_stats(
        hidden.detach(), head.weight.detach(), labels, bias, float(head.logit_scale),
        _number(head.softcap), impl,
    )  # fmt: skip
    return TokenStats(*outputs)


def linear_kl(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_weight: Tensor, impl: str
) -> Tensor:
    """KL(reference || policy) (T,) by the backend for `impl`, differentiable once."""
    trained = torch.is_grad_enabled()
    outputs: tuple[Tensor, ...] = _linear_kl(
        hidden, head.weight, ref_hidden.detach(), ref_weight.detach(), float(head.logit_scale),
        _number(head.softcap), trained and hidden.requires_grad,
        trained and head.weight.requires_grad, impl,
    )  # fmt: skip
    return outputs[0]


def score_geometry(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    per_pair: bool,
    impl: str,
) -> ScoreGeometry:
    """Norms and cosine of the scores by the backend for `impl`."""
    token_weights = None if token_weights is None else token_weights.detach()
    outputs: tuple[Tensor, ...] = _score_geometry(
        hidden.detach(), head.weight.detach(), labels, cu_seqlens, token_weights, per_pair,
        float(head.logit_scale), _number(head.softcap), impl,
    )  # fmt: skip
    return ScoreGeometry(*outputs)


# An op returns tensors only, so an output that is not computed is an empty tensor, (0,).
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
    outputs = _empty_logps_outputs(hidden, weight, train_hidden, train_head, impl)
    sums, sketch = _empty_score_sums(hidden, rows), None
    if sums is not None:
        signs = None
        if rows < len(weight):
            signs = sketch_signs(len(weight), rows, hidden.device, sums.dtype)
        sketch = ScoreSketch(sums, signs, first_rejected, token_weights)
    head = Head(weight, bias, logit_scale, softcap)
    backend_for(impl, hidden).linear_logps_fwd(hidden, head, labels.long(), *outputs, sketch)
    logps, lse, dlogp_dhidden, dlogits, row_scale = outputs
    return (
        logps, lse, _or_empty(dlogp_dhidden, hidden), _or_empty(dlogits, hidden),
        _or_empty(row_scale, hidden), _or_empty(sums, hidden),
    )  # fmt: skip


@_linear_logps.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, rows, _, train_hidden, train_head, impl = rest
    outputs = _empty_logps_outputs(hidden, weight, train_hidden, train_head, impl)
    return tuple(_or_empty(x, hidden) for x in (*outputs, _empty_score_sums(hidden, rows)))


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
            grad_hidden = _scale_rows(dlogp_dhidden, grad_logps)
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
    head = Head(weight, bias, logit_scale, softcap)
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    cached = dlogits.dim() == 2
    backend_for(impl, hidden).linear_logps_bwd(
        grad_logps, hidden, head, labels.long(), lse, dlogits if cached else None,
        row_scale if cached else None, grad_weight, grad_bias,
    )  # fmt: skip
    return _or_empty(grad_weight, hidden), _or_empty(grad_bias, hidden)


@_linear_logps_bwd.register_fake
def _(grad_logps: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, bias, *_, need_weight, need_bias, _ = rest
    parameters = (weight if need_weight else None, bias if need_bias else None)
    return tuple(hidden.new_empty(0) if x is None else torch.empty_like(x) for x in parameters)


@torch.library.custom_op("fastpref::scale_rows", mutates_args=())
def _scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """scale[:, None] * rows, multiplied in the dtype of scale and rounded once, without a copy."""
    return torch.mul(rows, scale[:, None], out=torch.empty_like(rows))


@_scale_rows.register_fake
def _(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("fastpref::token_stats", mutates_args=())
def _token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap)
    backend = backend_for(impl, hidden)
    logps, lse, entropy, top1 = backend.token_stats(hidden, head, labels.long())
    return logps, lse, entropy, top1


@_token_stats.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    logps, lse, entropy = _empty_rows(hidden, 3)
    return logps, lse, entropy, labels.new_empty(labels.shape, dtype=torch.bool)


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
    head = Head(weight, None, logit_scale, softcap)
    kl, lse, ref_lse = _empty_rows(hidden, 3)
    dkl_dhidden = _contiguous_empty_like(hidden) if train_hidden else None
    backend_for(impl, hidden).linear_kl_fwd(
        hidden, head, ref_hidden, ref_weight, kl, lse, ref_lse, dkl_dhidden
    )
    return kl, lse, ref_lse, _or_empty(dkl_dhidden, hidden)


@_linear_kl.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, train_hidden, _, _ = rest
    kl, lse, ref_lse = _empty_rows(hidden, 3)
    dkl_dhidden = _contiguous_empty_like(hidden) if train_hidden else None
    return kl, lse, ref_lse, _or_empty(dkl_dhidden, hidden)


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
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = None
    if grad_kl is not None:
        dkl_dhidden, *saved_for_head = ctx.saved_tensors
        if need_hidden:
            grad_hidden = _scale_rows(dkl_dhidden, grad_kl)
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
    head = Head(weight, None, logit_scale, softcap)
    grad_weight = torch.empty_like(weight)
    backend_for(impl, hidden).linear_kl_bwd(
        grad_kl, hidden, head, ref_hidden, ref_weight, lse, ref_lse, grad_weight
    )
    return grad_weight


@_linear_kl_bwd.register_fake
def _(grad_kl: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("fastpref::score_geometry", mutates_args=())
def _score_geometry(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    per_pair: bool,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > len(hidden) or sorted(ends) != ends:
        raise ValueError(
            f"cu_seqlens: must rise from 0 to at most {len(hidden)}, the rows of hidden, got {ends}"
        )
    pairs = len(ends) // 2
    groups = [(slice(ends[0], ends[pairs]), slice(ends[pairs], ends[-1]))]
    if per_pair:
        spans = [slice(a, b) for a, b in pairwise(ends)]
        groups = list(zip(spans[:pairs], spans[pairs:], strict=True))
    # Padding rows may hold NaN (attention over nothing); times a gradient of 0 that is still NaN.
    hidden = hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0.0)
    head, labels = Head(weight, None, logit_scale, softcap), labels.long()
    backend = backend_for(impl, hidden)
    logps, lse = _empty_rows(hidden, 2)
    backend.linear_logps_fwd(hidden, head, labels, logps, lse, None, None, None)
    with torch.autocast(hidden.device.type, enabled=False):
        products = score_products(backend, hidden, head, labels, lse, token_weights, groups)
    chosen, rejected, product = products.unbind(1)
    # Rounding may give a squared norm slightly below 0.
    chosen, rejected = chosen.clamp(min=0).sqrt(), rejected.clamp(min=0).sqrt()
    size = chosen * rejected
    cosine = (product / size).masked_fill(size == 0, 0.0).clamp(-1, 1)
    if per_pair:
        return chosen, rejected, cosine
    return chosen[0] / pairs, rejected[0] / pairs, cosine[0].clone()


@_score_geometry.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, cu_seqlens, _, per_pair, *_ = rest
    shape = ((len(cu_seqlens) - 1) // 2,) if per_pair else ()
    dtype = statistics_dtype(hidden)
    return tuple(hidden.new_empty(shape, dtype=dtype) for _ in range(3))


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _empty_rows(hidden: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = statistics_dtype(hidden)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(count))


def _empty_logps_outputs(
    hidden: Tensor, weight: Tensor, train_hidden: bool, train_head: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logps, lse, dlogp_dhidden, dlogits and row_scale; None for those that are not needed."""
    logps, lse = _empty_rows(hidden, 2)
    dlogp_dhidden = _contiguous_empty_like(hidden) if train_hidden else None
    dlogits = backend_for(impl, hidden).new_dlogits_cache(hidden, weight) if train_head else None
    row_scale = None if dlogits is None else torch.empty_like(lse)
    return logps, lse, dlogp_dhidden, dlogits, row_scale


def _empty_score_sums(hidden: Tensor, rows: int) -> Tensor | None:
    """Sums (2, rows, D) of the chosen and rejected scores, or None for 0 rows."""
    if not rows:
        return None
    return hidden.new_empty(2, rows, hidden.shape[1], dtype=statistics_dtype(hidden))


def _contiguous_empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # empty_like would copy the strides of x


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
