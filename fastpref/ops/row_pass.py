"""The elementwise work on rows of logits between two GEMMs, and its implementation in PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.reference import TokenStats


class RowPass(NamedTuple):
    """The elementwise work on rows of logits, in place, and the policy of caching dlogits.

    score(logits, labels, entropy, scale) returns the statistics of each row (entropy 0 unless
    requested). With a scale it replaces the logits by scale * (onehot - softmax); without one
    they are left in any state. The statistics must not depend on scale or entropy.

    dlogits(logits, labels, lse, row_scale) replaces some columns of the logits by
    row_scale[t] * (onehot - exp(logits - lse)); labels outside the columns have no onehot.

    caches_dlogits(hidden, weight) says whether the (T, V) dlogits of a trained head stay in memory
    from forward to backward.
    """

    score: Callable[[Tensor, Tensor, bool, float | None], TokenStats]
    dlogits: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    caches_dlogits: Callable[[Tensor, Tensor], bool]


def _torch_score(logits: Tensor, labels: Tensor, entropy: bool, scale: float | None) -> TokenStats:
    row_max = logits.amax(1, keepdim=True)
    target = logits.gather(1, labels[:, None])
    exp_logits = logits.sub_(row_max).exp_()
    total = exp_logits.sum(1, keepdim=True)
    log_total = total.log()
    entropies = torch.zeros_like(total)
    if entropy:
        # Below the smallest normal number x log x counts as 0; log 0 would give NaN.
        tiny = torch.finfo(logits.dtype).tiny
        terms = exp_logits.clamp(min=tiny).log_().mul_(exp_logits).sum(1, keepdim=True)
        entropies = log_total - terms / total
    if scale is not None:
        dlogits = exp_logits.mul_(-scale / total)
        dlogits.scatter_(1, labels[:, None], dlogits.gather(1, labels[:, None]) + scale)
    logps = (target - row_max) - log_total
    columns = logps, row_max + log_total, entropies, target >= row_max
    return TokenStats(*(x.squeeze(1) for x in columns))


def _torch_dlogits(logits: Tensor, labels: Tensor, lse: Tensor, row_scale: Tensor) -> None:
    dlogits = logits.sub_(lse[:, None]).exp_().mul_(-row_scale[:, None])
    outside = (labels < 0) | (labels >= dlogits.shape[1])
    columns = labels.masked_fill(outside, 0)[:, None]
    onehot = row_scale.masked_fill(outside, 0.0)[:, None]
    dlogits.scatter_(1, columns, dlogits.gather(1, columns) + onehot)


TORCH_ROWS = RowPass(_torch_score, _torch_dlogits, caches_dlogits=lambda hidden, weight: False)
