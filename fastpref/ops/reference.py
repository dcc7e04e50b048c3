"""Every op in plain PyTorch with ordinary autograd: the specification.

Logits, everywhere in the package, are

    raw   = logit_scale * (hidden @ weight.T + bias)            (T, V)
    logit = softcap * tanh(raw / softcap)   if softcap, else raw

and are held in fp32 for fp16, bf16 and fp32 inputs and in fp64 for fp64 inputs: half-precision
inputs are widened before the GEMM, so no logit and no statistic is ever rounded to half. The
active autocast state is ignored. A token labeled `IGNORE_INDEX` gives 0 for every statistic and
no gradient, whatever its hidden state holds.

These functions build the (T, V) logits, so they are for tests and small inputs. Arguments are
validated in `fastpref.ops`, which has the same signatures plus `impl`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.logps import segment_sum as segment_sum
from fastpref.ops.backend import Head
from fastpref.ops.score_sketch import SKETCH_ROWS, sketch_rows, sketch_signs

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
    logits = _logits(_drop(hidden, ignored), Head(weight, bias, logit_scale, softcap))
    columns = labels.masked_fill(ignored, 0).long()
    logps = logits.log_softmax(1).gather(1, columns[:, None]).squeeze(1)
    return logps.masked_fill(ignored, 0.0)


def linear_logps_and_scores(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    first_rejected: int,
    *,
    token_weights: Tensor | None = None,  # (T,)
    rows: int | None = SKETCH_ROWS,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # (T,), (2, min(rows, V), D)
    """Log-probs, and sketches of the summed scores of tokens before and from `first_rejected`."""
    head = Head(weight, bias, logit_scale, softcap)
    logps = linear_logps(
        hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
    )
    inputs = _drop(hidden.detach(), labels == IGNORE_INDEX).to(statistics_dtype(hidden))
    dlogits = _dlogits(inputs, head, labels)
    if token_weights is not None:
        inputs = inputs * token_weights.detach().to(inputs)[:, None]
    sides = slice(first_rejected), slice(first_rejected, None)
    scores = torch.stack([dlogits[side].T @ inputs[side] for side in sides])  # (2, V, D)
    size = sketch_rows(len(weight), rows)
    signs = sketch_signs(len(weight), size, scores.device, scores.dtype)
    signed = signs.flatten()[: len(weight), None] * scores
    buckets = torch.arange(len(weight), device=scores.device) % size
    sums = scores.new_zeros(2, size, scores.shape[2])
    return logps, sums.index_add_(1, buckets, signed)


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
    """Log-prob, log-sum-exp and entropy of each token, and whether its label is the most likely."""
    ignored = labels == IGNORE_INDEX
    logits = _logits(_drop(hidden, ignored), Head(weight, bias, logit_scale, softcap))
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
    head = Head(weight, None, logit_scale, softcap)
    logp = _logits(hidden, head).log_softmax(1)
    ref_head = head._replace(weight=ref_weight.detach())
    logq = _logits(ref_hidden.detach(), ref_head).log_softmax(1)
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
    """Rényi entropy of order 2 of each token's distribution, `-log sum_v p[t, v]^2`, in nats."""
    ignored = labels == IGNORE_INDEX
    logp = _logits(_drop(hidden, ignored), Head(weight, bias, logit_scale, softcap)).log_softmax(1)
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

        s = dlogits.T @ H     (V, D),     dlogits[t, v] = d logps[t] / d (h_t . w_v),

    over its tokens. With token weights c it is the gradient of sum_t c[t] logps[t],
    dlogits.T @ diag(c) @ H. With `per_pair` the scores of each pair are measured; otherwise the
    means of the chosen and of the rejected scores over the batch. The cosine is 0 if a norm is 0.
    """
    ignored = labels == IGNORE_INDEX
    rows = _drop(hidden, ignored).to(statistics_dtype(hidden))
    dlogits = _dlogits(rows, Head(weight, None, logit_scale, softcap), labels)
    if token_weights is not None:
        rows = rows * token_weights.to(rows)[:, None]
    segments = _segment_ids(cu_seqlens, len(labels))
    scores = torch.stack(
        [(dlogits * (segments == s)[:, None]).T @ rows for s in range(len(cu_seqlens) - 1)]
    ).flatten(1)  # (S, V * D)
    chosen, rejected = scores.chunk(2)
    if not per_pair:
        chosen, rejected = chosen.mean(0), rejected.mean(0)
    chosen_norm, rejected_norm = chosen.norm(dim=-1), rejected.norm(dim=-1)
    norms = chosen_norm * rejected_norm
    cosine = (chosen * rejected).sum(-1) / norms
    return ScoreGeometry(chosen_norm, rejected_norm, cosine.masked_fill(norms == 0, 0.0))


def _logits(hidden: Tensor, head: Head) -> Tensor:
    dtype = statistics_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ head.weight.to(dtype).T
        if head.bias is not None:
            logits = logits + head.bias.to(dtype)
        return _cap(logits * head.logit_scale, head.softcap)


def _cap(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _drop(hidden: Tensor, ignored: Tensor) -> Tensor:
    # Padding rows may hold NaN (attention over nothing); times a zero gradient that is still NaN.
    return hidden.masked_fill(ignored[:, None], 0.0)


def _dlogits(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """d logps[t] / d (h_t . w_v), (T, V), by autograd with respect to hidden @ weight.T."""
    ignored = labels == IGNORE_INDEX
    bias = 0.0 if head.bias is None else head.bias.detach().to(hidden.dtype)

    def sum_of_logps(raw: Tensor) -> Tensor:
        logps = _cap((raw + bias) * head.logit_scale, head.softcap).log_softmax(1)
        target = logps.gather(1, labels.masked_fill(ignored, 0).long()[:, None]).squeeze(1)
        return target.masked_fill(ignored, 0.0).sum()

    with torch.autocast(hidden.device.type, enabled=False):
        raw = hidden.detach() @ head.weight.detach().to(hidden.dtype).T
        dlogits: Tensor = torch.func.grad(sum_of_logps)(raw)
    return dlogits


def _segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)
