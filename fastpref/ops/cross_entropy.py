"""Terms of a cross entropy that log-probs alone do not give, without the logits in memory.

    logps[t]          = z[t, labels[t]] - lse[t]
    lse[t]            = logsumexp(z[t])
    weighted_logps[t] = sum_v c[v] (z[t, v] - lse[t])
    predicted[t]      = the v of the largest z[t, v]

with z the logits of `fastpref.ops.reference` and c a vector of weights of the vocabulary. The
gradient of all three by the logits needs only lse of the forward pass, p = exp(z - lse):

    dz[t, v] = a onehot + (b - a - g sum(c)) p + g c[v]

with a, b and g the upstream gradients of logps, lse and weighted_logps.

Plain PyTorch on any device, with the chunks of `fastpref.ops.chunked`: the forward pass holds the
logits of a chunk of tokens, the backward pass those of a panel of the vocabulary. GEMMs over the
head: 1 for the values, 1 more for them again in backward, 1 each for hidden states and weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops import chunked
from fastpref.ops.backend import Head
from fastpref.ops.bounds import require_labels_in_range
from fastpref.ops.checks import check_device, check_head, check_labels
from fastpref.ops.reference import IGNORE_INDEX, statistics_dtype
from fastpref.utils.first_order import refuse_second_order, refuse_transforms

_NAME, _REMEDY = "cross_entropy_terms", "compute the loss from full logits"


class CrossEntropyTerms(NamedTuple):
    """Values of each token, 0 (predicted: -1) where it is ignored."""

    logps: Tensor  # (T,) log-prob of the label, in nats
    lse: Tensor  # (T,) log of the sum of exp(logits)
    weighted_logps: Tensor  # (T,) weighted sum of all log-probs, 0 without weights
    predicted: Tensor  # (T,) int64 index of the largest logit, without gradient


def cross_entropy_terms(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    class_weights: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> CrossEntropyTerms:
    """Terms of the cross entropy of each token, differentiable in hidden, weight and bias.

    class_weights: constants c[v] of `weighted_logps`, of any floating dtype.

    Values are fp32, fp64 for fp64 inputs, by one implementation on every device. Under autocast an
    fp32 weight is rounded to the dtype of hidden, and its gradient is not. Only the gradient of
    `torch.autograd` exists: other derivatives raise RuntimeError. Raises ValueError, naming the
    argument, for a wrong shape, dtype, device or number.
    """
    head = Head(weight, bias, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_labels(labels, hidden)
    if class_weights is not None:
        _check_class_weights(class_weights, weight)
        class_weights = class_weights.detach().to(statistics_dtype(hidden))
    refuse_transforms(_NAME, hidden, weight, bias, remedy=_REMEDY)
    terms: tuple[Tensor, ...] = _terms(
        hidden, weight, labels, bias, class_weights, float(logit_scale),
        None if softcap is None else float(softcap),
    )  # fmt: skip
    return CrossEntropyTerms(*terms)


def _check_class_weights(class_weights: Tensor, weight: Tensor) -> None:
    if class_weights.shape != (len(weight),) or not class_weights.is_floating_point():
        raise ValueError(
            f"class_weights: expected floating point of shape ({len(weight)},), one per row of "
            f"weight, got shape {tuple(class_weights.shape)} of {class_weights.dtype}"
        )
    check_device("class_weights", class_weights, weight, "weight")


@torch.library.custom_op("fastpref::cross_entropy_terms", mutates_args=())
def _terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap).rounded_to(hidden.dtype)
    tokens, vocabulary = len(hidden), len(weight)
    require_labels_in_range(labels, vocabulary)
    ignored = labels == IGNORE_INDEX
    columns = labels.long().masked_fill(ignored, 0)
    dtype = statistics_dtype(hidden)
    chunk = max(1, min(chunked.CHUNK_BYTES // (dtype.itemsize * vocabulary), tokens))
    buffer = hidden.new_empty(chunk, vocabulary, dtype=dtype)
    logps, lse, weighted = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
    predicted = torch.full_like(columns, -1)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunked._slices(tokens, chunk):
            size = rows.stop - rows.start
            logits = buffer[:size]
            inputs = chunked._zero_ignored(hidden[rows], labels[rows])
            chunked._project(inputs, head.weight, out=logits)
            for part in chunked._slices(size, -(-chunk // chunked.SLICES)):
                t = slice(rows.start + part.start, rows.start + part.stop)
                chunked._finish_logits(logits[part], head, False)
                logps[t], lse[t], weighted[t], predicted[t] = _score(
                    logits[part], columns[t], class_weights
                )
    for values in (logps, lse, weighted):
        values.masked_fill_(ignored, 0.0)
    return logps, lse, weighted, predicted.masked_fill_(ignored, -1)


@_terms.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = (hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden)) for _ in range(3))
    return *rows, labels.new_empty(labels.shape, dtype=torch.int64)


def _score(
    logits: Tensor, columns: Tensor, class_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms of rows of logits, which are left in any state."""
    row_max, predicted = logits.max(1, keepdim=True)
    target = logits.gather(1, columns[:, None]) - row_max
    shifted = logits.sub_(row_max)
    weighted = torch.zeros_like(row_max)
    if class_weights is not None:
        weighted = shifted @ class_weights[:, None]
    log_total = shifted.exp_().sum(1, keepdim=True).log_()
    if class_weights is not None:
        weighted -= log_total * class_weights.sum()
    terms = target - log_total, row_max + log_total, weighted, predicted
    logps, lse, weighted, predicted = (x.squeeze(1) for x in terms)
    return logps, lse, weighted, predicted


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, class_weights, ctx.logit_scale, ctx.softcap = inputs
    _, lse, _, predicted = output
    ctx.mark_non_differentiable(predicted)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, class_weights, lse)


def _backward(
    ctx: Any,
    grad_logps: Tensor | None,
    grad_lse: Tensor | None,
    grad_weighted: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    refuse_second_order(_NAME, _REMEDY)
    hidden, weight, labels, bias, class_weights, lse = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    upstream = [torch.zeros_like(lse) if g is None else g for g in (grad_logps, grad_lse)]
    if class_weights is None:
        grad_weighted = None
    gradients: tuple[Tensor, ...] = _terms_bwd(
        *upstream, grad_weighted, hidden, weight, labels, bias, class_weights, ctx.logit_scale,
        ctx.softcap, lse, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    needed = need_hidden, need_weight, need_bias
    of_hidden, of_weight, of_bias = (
        g if need else None for g, need in zip(gradients, needed, strict=True)
    )
    return of_hidden, of_weight, None, of_bias, None, None, None


_terms.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fastpref::cross_entropy_terms_bwd", mutates_args=())
def _terms_bwd(
    grad_logps: Tensor,
    grad_lse: Tensor,
    grad_weighted: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, or (0,) for one that is not needed."""
    ignored = labels == IGNORE_INDEX
    onehot, of_lse = (g.masked_fill(ignored, 0.0) for g in (grad_logps, grad_lse))
    of_softmax = of_lse - onehot
    of_classes = None
    if grad_weighted is not None and class_weights is not None:
        of_classes = grad_weighted.masked_fill(ignored, 0.0)
        of_softmax -= of_classes * class_weights.sum()
    grad_weight, grad_bias = weight.new_empty(0), hidden.new_empty(0)
    if need_weight:
        grad_weight = torch.empty_like(weight)
    if need_bias and bias is not None:
        grad_bias = torch.empty_like(bias)
    tokens, head = len(hidden), Head(weight, bias, logit_scale, softcap).rounded_to(hidden.dtype)
    hidden = chunked._zero_ignored(hidden, labels)
    sums = lse.new_zeros(hidden.shape if need_hidden else (0,))
    panels = list(chunked._panels(tokens, len(weight), lse.itemsize))
    buffer = lse.new_empty(tokens * (panels[0].stop - panels[0].start))
    with torch.autocast(hidden.device.type, enabled=False):
        for columns in panels:
            width = columns.stop - columns.start
            part, inside = head.rows(columns), labels.long() - columns.start
            panel = buffer[: tokens * width].view(tokens, width)
            chunked._project(hidden, part.weight, out=panel)
            for t in chunked._slices(tokens, max(1, -(-tokens // chunked.SLICES))):
                slope = chunked._finish_logits(panel[t], part, True)
                panel[t].sub_(lse[t, None]).exp_().mul_(of_softmax[t, None])
                if of_classes is not None and class_weights is not None:
                    panel[t].addr_(of_classes[t], class_weights[columns])
                _add_at_labels(panel[t], inside[t], onehot[t])
                panel[t].mul_(logit_scale if slope is None else slope.mul_(logit_scale))
            if need_hidden:
                chunked._pull_back(panel, part.weight, sums)
            if need_weight:
                chunked._outer(panel, hidden, out=grad_weight[columns])
            if need_bias:
                grad_bias[columns] = panel.sum(0)
    return sums.to(hidden.dtype), grad_weight, grad_bias


@_terms_bwd.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, _, hidden, weight, _, bias, *_, need_hidden, need_weight, need_bias = inputs
    needs = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return tuple(torch.empty_like(x) if need else hidden.new_empty(0) for x, need in needs)


def _add_at_labels(panel: Tensor, labels: Tensor, values: Tensor) -> None:
    """Add values (n,) at the labels of a panel (n, width); labels outside it add nothing."""
    outside = (labels < 0) | (labels >= panel.shape[1])
    columns = labels.masked_fill(outside, 0)[:, None]
    panel.scatter_add_(1, columns, values.masked_fill(outside, 0.0)[:, None])
