"""Every op in plain PyTorch with ordinary autograd: the specification.

Logits, everywhere in the package, are

    raw   = logit_scale * (hidden @ weight.T + bias)            (T, V)
    logit = softcap * tanh(raw / softcap)   if softcap, else raw

and are held in fp32 for fp16, bf16 and fp32 inputs and in fp64 for fp64 inputs: half-precision
inputs are widened before the product, so no logit and no statistic is ever rounded to half. The
active autocast state is ignored. A token labelled `IGNORE_INDEX` gives 0 for every statistic and
no gradient, whatever its hidden state holds.

These functions build the (T, V) logits, so they are for tests and small inputs. Arguments are
validated in `fastpref.ops`, which has the same signatures plus `impl`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.logps import segment_sum as segment_sum

IGNORE_INDEX = -100


class TokenStats(NamedTuple):
    """Statistics of each token's distribution: no gradient, 0 (False) where ignored."""

    logps: Tensor  # (T,) log-prob of the label, in nats
    lse: Tensor  # (T,) log of the sum of exp(logits)
    entropy: Tensor  # (T,) entropy of the softmax, in nats
    top1: Tensor  # (T,) bool: no logit is larger than the label's (a tie counts)


class ScoreGeometry(NamedTuple):
    """Norms and cosine of the chosen and rejected scores: () for batch means, (B,) per pair."""

    chosen_norm: Tensor
    rejected_norm: Tensor
    cosine: Tensor


def linear_logps(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (T,)
    """Log-prob of each label: `logits[t, labels[t]] - logsumexp(logits[t])`."""
    ignored = labels == IGNORE_INDEX
    logits = _logits(_drop(hidden, ignored), weight, bias, logit_scale, softcap)
    columns = labels.masked_fill(ignored, 0).long()
    logps = logits.log_softmax(1).gather(1, columns[:, None]).squeeze(1)
    return logps.masked_fill(ignored, 0.0)


@torch.no_grad()
def token_stats(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Log-prob, log-sum-exp, entropy and whether the label is the most likely token."""
    ignored = labels == IGNORE_INDEX
    logits = _logits(_drop(hidden, ignored), weight, bias, logit_scale, softcap)
    target = logits.gather(1, labels.masked_fill(ignored, 0).long()[:, None]).squeeze(1)
    lse = logits.logsumexp(1)
    return TokenStats(
        logps=(target - lse).masked_fill(ignored, 0.0),
        lse=lse.masked_fill(ignored, 0.0),
        entropy=torch.special.entr(logits.softmax(1)).sum(1).masked_fill(ignored, 0.0),
        top1=(target >= logits.amax(1)) & ~ignored,
    )


def linear_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (T, E)
    ref_weight: Tensor,  # (V, E)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (T,)
    """KL(reference || policy) of each token's distribution, differentiable in the policy only.

    kl[t] = sum_v q[t, v] * (log q[t, v] - log p[t, v]), q the reference and p the policy.
    """
    logp = _logits(hidden, weight, None, logit_scale, softcap).log_softmax(1)
    with torch.no_grad():
        logq = _logits(ref_hidden, ref_weight, None, logit_scale, softcap).log_softmax(1)
    return (logq.exp() * (logq - logp)).sum(1)


@torch.no_grad()
def collision_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (T,)
    """Renyi's entropy of order 2 of each token's distribution, `-log sum_v p[t, v]^2`, in nats."""
    ignored = labels == IGNORE_INDEX
    logp = _logits(_drop(hidden, ignored), weight, bias, logit_scale, softcap).log_softmax(1)
    return (-(2 * logp).logsumexp(1)).masked_fill(ignored, 0.0)


@torch.no_grad()
def score_geometry(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,), S = 2 B: chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}
    *,
    token_weights: Tensor | None = None,  # (T,)
    per_pair: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> ScoreGeometry:
    """Frobenius norms and cosine of the scores of chosen and rejected responses.

    The score of a sequence is the gradient of its summed log-prob with respect to `weight`,

        s = delta.T @ H     (V, D),     delta[t, v] = d logps[t] / d (h_t . w_v),

    over its tokens; with token weights c that of sum_t c[t] logps[t], delta.T @ diag(c) @ H. With
    `per_pair` each pair's own scores are measured; otherwise the means of the chosen and of the
    rejected scores over the batch. The cosine is 0 if a norm is 0.
    """
    ignored = labels == IGNORE_INDEX
    kept = _drop(hidden, ignored).to(statistics_dtype(hidden))
    delta = _score_deltas(kept, weight, labels, ignored, logit_scale, softcap)
    if token_weights is not None:
        kept = kept * token_weights.to(kept)[:, None]
    segments = _segment_ids(cu_seqlens, len(labels))
    scores = torch.stack(
        [(delta * (segments == s)[:, None]).T @ kept for s in range(len(cu_seqlens) - 1)]
    ).flatten(1)  # (S, V * D)
    chosen, rejected = scores.chunk(2)
    if not per_pair:
        chosen, rejected = chosen.mean(0), rejected.mean(0)
    chosen_norm, rejected_norm = chosen.norm(dim=-1), rejected.norm(dim=-1)
    norms = chosen_norm * rejected_norm
    cosine = (chosen * rejected).sum(-1) / norms
    return ScoreGeometry(chosen_norm, rejected_norm, cosine.masked_fill(norms == 0, 0.0))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    dtype = statistics_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        return _cap(logits * logit_scale, softcap)


def _cap(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _drop(hidden: Tensor, ignored: Tensor) -> Tensor:
    # Padding rows may hold NaN (attention over nothing); times a zero gradient that is still NaN.
    return hidden.masked_fill(ignored[:, None], 0.0)


def _score_deltas(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignored: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """`d logps[t] / d (h_t . w_v)`, (T, V), by autograd on the products themselves."""
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        products = (hidden @ weight.detach().to(hidden.dtype).T).detach().requires_grad_()
        logps = _cap(products * logit_scale, softcap).log_softmax(1)
        target = logps.gather(1, labels.masked_fill(ignored, 0).long()[:, None]).squeeze(1)
        (delta,) = torch.autograd.grad(target.masked_fill(ignored, 0.0).sum(), products)
    return delta


def _segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)
