"""The differentiable ops as torch knows them: one schema, shapes and derivative for all backends.

Each is opaque to tracing, so `torch.compile` keeps the graph whole, and has a fake implementation
that needs shapes alone. A backend fills in numbers; derivatives are written once, here:

    logps[t] = log-prob of a token's label       kl[t] = KL(reference || policy) of a token
    d logps[t] / d hidden_t = direction_t        computed forward: it knows no upstream gradient
    d hidden_t = g_t * direction_t               all that is left to do backward, g the upstream
    d weight, d bias                             by the backend, from deltas kept or made again

Only `fastpref.ops` calls this module; arguments arrive checked.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastpref.ops.dispatch import backend_for
from fastpref.ops.reference import IGNORE_INDEX, ScoreGeometry, TokenStats, statistics_dtype
from fastpref.ops.score_products import score_products


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    """Log-probs (T,) by the backend that `impl` means, differentiable once."""
    trained = torch.is_grad_enabled()
    train_hidden = trained and hidden.requires_grad
    train_head = trained and (weight.requires_grad or (bias is not None and bias.requires_grad))
    outputs: tuple[Tensor, ...] = _linear_logps(
        hidden, weight, labels, bias, float(logit_scale), _number(softcap), train_hidden,
        train_head, impl,
    )  # fmt: skip
    return outputs[0]


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> TokenStats:
    """Statistics of each token by the backend that `impl` means."""
    bias = None if bias is None else bias.detach()
    scale, cap = float(logit_scale), _number(softcap)
    return TokenStats(
        *_token_stats(hidden.detach(), weight.detach(), labels, bias, scale, cap, impl)
    )


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    """KL(reference || policy) (T,) by the backend that `impl` means, differentiable once."""
    trained = torch.is_grad_enabled()
    outputs: tuple[Tensor, ...] = _linear_kl(
        hidden, weight, ref_hidden.detach(), ref_weight.detach(), float(logit_scale),
        _number(softcap), trained and hidden.requires_grad, trained and weight.requires_grad,
        impl,
    )  # fmt: skip
    return outputs[0]


def score_geometry(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    per_pair: bool,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> ScoreGeometry:
    """Norms and cosine of the scores by the backend that `impl` means."""
    token_weights = None if token_weights is None else token_weights.detach()
    geometry: tuple[Tensor, ...] = _score_geometry(
        hidden.detach(), weight.detach(), labels, cu_seqlens, token_weights, per_pair,
        float(logit_scale), _number(softcap), impl,
    )  # fmt: skip
    return ScoreGeometry(*geometry)


@torch.library.custom_op("fastpref::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    train_hidden: bool,
    train_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logps, lse, and direction and deltas or (0,)
    backend = backend_for(impl, hidden)
    logps, lse = _empty_rows(hidden, 2)
    direction = _empty_direction(hidden) if train_hidden else None
    deltas = backend.kept_deltas(hidden, weight) if train_head else None
    backend.linear_logps_fwd(
        hidden, weight, labels.long(), bias, logit_scale, softcap, logps, lse, direction, deltas
    )
    return logps, lse, _or_nothing(direction, hidden), _or_nothing(deltas, hidden)


@_linear_logps.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, train_hidden, train_head, impl = rest
    logps, lse = _empty_rows(hidden, 2)
    direction = _empty_direction(hidden) if train_hidden else None
    deltas = backend_for(impl, hidden).kept_deltas(hidden, weight) if train_head else None
    return logps, lse, _or_nothing(direction, hidden), _or_nothing(deltas, hidden)


def _save_logps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, *ctx.options, train_hidden, train_head, ctx.impl = inputs
    _, lse, direction, deltas = output
    ctx.mark_non_differentiable(lse, direction, deltas)
    ctx.set_materialize_grads(False)
    of_the_head = (hidden, weight, bias, lse, deltas) if train_head else (None,) * 5
    ctx.save_for_backward(labels, direction if train_hidden else None, *of_the_head)


def _logps_bwd(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = grad_bias = None
    if upstream is not None:
        labels, direction, hidden, weight, bias, lse, deltas = ctx.saved_tensors
        gain = upstream.masked_fill(labels == IGNORE_INDEX, 0.0)
        if need_weight or need_bias:  # first, while there is no grad_hidden beside its temporaries
            grad_weight, grad_bias = _linear_logps_bwd(
                gain, hidden, weight, labels, bias, *ctx.options, lse, deltas, need_weight,
                need_bias, ctx.impl,
            )  # fmt: skip
        if need_hidden:
            grad_hidden = _scale_rows(direction, gain)
    return (
        grad_hidden, grad_weight if need_weight else None, None, grad_bias if need_bias else None,
        *(None,) * 5,
    )  # fmt: skip


_linear_logps.register_autograd(_logps_bwd, setup_context=_save_logps)


@torch.library.custom_op("fastpref::linear_logps_bwd", mutates_args=())
def _linear_logps_bwd(
    gain: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,
    deltas: Tensor,  # or (0,)
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:  # gradients of weight and bias, or (0,)
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    backend_for(impl, hidden).linear_logps_bwd(
        gain, hidden, weight, labels.long(), bias, logit_scale, softcap, lse,
        deltas if deltas.dim() == 2 else None, grad_weight, grad_bias,
    )  # fmt: skip
    return _or_nothing(grad_weight, hidden), _or_nothing(grad_bias, hidden)


@_linear_logps_bwd.register_fake
def _(gain: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, bias, *_, need_weight, need_bias, _ = rest
    wanted = (weight if need_weight else None, bias if need_bias else None)
    return tuple(hidden.new_empty(0) if x is None else torch.empty_like(x) for x in wanted)


@torch.library.custom_op("fastpref::scale_rows", mutates_args=())
def _scale_rows(rows: Tensor, gain: Tensor) -> Tensor:
    """gain[:, None] * rows, multiplied in the dtype of gain and rounded once, without a copy."""
    return torch.mul(rows, gain[:, None], out=torch.empty_like(rows))


@_scale_rows.register_fake
def _(rows: Tensor, gain: Tensor) -> Tensor:
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
    logps, lse, entropy, top1 = backend_for(impl, hidden).token_stats(
        hidden, weight, labels.long(), bias, logit_scale, softcap
    )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # kl, lse, ref_lse, and direction or (0,)
    kl, lse, ref_lse = _empty_rows(hidden, 3)
    direction = _empty_direction(hidden) if train_hidden else None
    backend_for(impl, hidden).linear_kl_fwd(
        hidden, weight, ref_hidden, ref_weight, logit_scale, softcap, kl, lse, ref_lse, direction
    )
    return kl, lse, ref_lse, _or_nothing(direction, hidden)


@_linear_kl.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, train_hidden, _, _ = rest
    kl, lse, ref_lse = _empty_rows(hidden, 3)
    direction = _empty_direction(hidden) if train_hidden else None
    return kl, lse, ref_lse, _or_nothing(direction, hidden)


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *heads, logit_scale, softcap, train_hidden, train_head, ctx.impl = inputs
    ctx.options = logit_scale, softcap
    _, lse, ref_lse, direction = output
    ctx.mark_non_differentiable(lse, ref_lse, direction)
    ctx.set_materialize_grads(False)
    of_the_head = (*heads, lse, ref_lse) if train_head else (None,) * 6
    ctx.save_for_backward(direction if train_hidden else None, *of_the_head)


def _kl_bwd(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = None
    if upstream is not None:
        direction, *of_the_head = ctx.saved_tensors
        if need_hidden:
            grad_hidden = _scale_rows(direction, upstream)
        if need_weight:
            grad_weight = _linear_kl_bwd(upstream, *of_the_head, *ctx.options, ctx.impl)
    return grad_hidden, grad_weight, *(None,) * 7


_linear_kl.register_autograd(_kl_bwd, setup_context=_save_kl)


@torch.library.custom_op("fastpref::linear_kl_bwd", mutates_args=())
def _linear_kl_bwd(
    gain: Tensor,
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
    grad_weight = torch.empty_like(weight)
    backend_for(impl, hidden).linear_kl_bwd(
        gain, hidden, weight, ref_hidden, ref_weight, logit_scale, softcap, lse, ref_lse,
        grad_weight,
    )  # fmt: skip
    return grad_weight


@_linear_kl_bwd.register_fake
def _(gain: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
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
    # Padding rows may hold NaN (attention over nothing); times a delta of 0 that is still NaN.
    kept = hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0.0)
    backend, labels = backend_for(impl, hidden), labels.long()
    logps, lse = _empty_rows(hidden, 2)
    backend.linear_logps_fwd(
        kept, weight, labels, None, logit_scale, softcap, logps, lse, None, None
    )

    def delta(hidden: Tensor, labels: Tensor, lse: Tensor, panel: slice) -> Tensor:
        return backend.delta_panel(
            hidden, weight[panel], labels, logit_scale, softcap, lse, panel.start
        )

    with torch.autocast(hidden.device.type, enabled=False):
        products = score_products(kept, labels, lse, token_weights, len(weight), groups, delta)
    chosen, rejected, product = products.unbind(1)
    # A norm that rounding would take below 0 is 0.
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


def _empty_direction(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)  # contiguous, whatever the strides of hidden


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x  # an op returns tensors only
