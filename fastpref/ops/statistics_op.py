"""The statistics without gradient as torch knows them: of tokens, and of the scores of pairs."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastpref.ops.backend import Head
from fastpref.ops.bounds import require_labels_in_range, require_offsets_in_range
from fastpref.ops.dispatch import backend_for
from fastpref.ops.op_parts import empty_rows, number
from fastpref.ops.reference import IGNORE_INDEX, ScoreGeometry, TokenStats, statistics_dtype
from fastpref.ops.score_products import score_products


def token_stats(hidden: Tensor, head: Head, labels: Tensor, impl: str) -> TokenStats:
    """Statistics of each token by the backend for `impl`, without gradient."""
    head = head.detach()
    outputs: tuple[Tensor, ...] = _token_stats(
        hidden.detach(), head.weight, labels, head.bias, float(head.logit_scale),
        number(head.softcap), impl,
    )  # fmt: skip
    return TokenStats(*outputs)


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
        float(head.logit_scale), number(head.softcap), impl,
    )  # fmt: skip
    return ScoreGeometry(*outputs)


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
    require_labels_in_range(labels, len(weight))
    head = Head(weight, bias, logit_scale, softcap).rounded_to(hidden.dtype)
    backend = backend_for(impl, hidden)
    logps, lse, entropy, top1 = backend.token_stats(hidden, head, labels.long())
    return logps, lse, entropy, top1


@_token_stats.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    logps, lse, entropy = empty_rows(hidden, 3)
    return logps, lse, entropy, labels.new_empty(labels.shape, dtype=torch.bool)


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
    require_labels_in_range(labels, len(weight))
    cu_seqlens = cu_seqlens.cpu()
    require_offsets_in_range(cu_seqlens, len(hidden))
    ends = cu_seqlens.tolist()
    pairs = len(ends) // 2
    groups = [(slice(ends[0], ends[pairs]), slice(ends[pairs], ends[-1]))]
    if per_pair:
        spans = [slice(a, b) for a, b in pairwise(ends)]
        groups = list(zip(spans[:pairs], spans[pairs:], strict=True))
    # Padding rows may hold NaN (attention over nothing); times a gradient of 0 that is still NaN.
    hidden = hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0.0)
    head = Head(weight, None, logit_scale, softcap).rounded_to(hidden.dtype)
    labels = labels.long()
    backend = backend_for(impl, hidden)
    logps, lse = empty_rows(hidden, 2)
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
