"""The ops that users call: each validates its arguments and calls the chosen implementation.

Shapes: T tokens, S sequences, D hidden size, V vocabulary. `hidden` (T, D), `weight` (V, D) and
`bias` (V,) are fp16, bf16, fp32 or fp64, all of one dtype on one device; `labels` (T,) and
`cu_seqlens` (S + 1,) are int32 or int64. Labels are vocabulary indices or -100, which means
"ignored": every statistic is 0 and no gradient flows. Results are fp32 (fp64 for fp64 inputs), in
nats. `fastpref.ops.reference` defines the logits, and how half precision and autocast are treated.

`impl` is "auto" or the name of a row of `fastpref.ops.dispatch.TABLE`. "auto" takes the first
row that is installed and accepts the device and dtype; a named implementation is used or refused,
never replaced.
A label out of range, and offsets that do not rise from 0 to T, raise ValueError, too; on a GPU the
device itself checks them, and stops (`fastpref.ops.bounds`). Inside `torch.compile` an op is one
node of the graph.

Under autocast a weight or bias may be fp32 where the hidden states have the autocast dtype: it is
rounded to that dtype, as for a linear layer, and its gradient is fp32 and not rounded.

Derivatives are those of `torch.autograd`, of first order. With a second derivative
(`create_graph=True`), in a transform of `torch.func`, and in forward mode an op raises
RuntimeError; `impl="reference"` has all of them.
"""

import torch
from torch import Tensor

from fastpref.ops import dispatch, kl_op, logps_op, reference, segments, statistics_op
from fastpref.ops.backend import Head
from fastpref.ops.bounds import labels_in_range, offsets_in_range
from fastpref.ops.checks import (
    check_device,
    check_head,
    check_labels,
    check_offsets,
    check_plain,
    check_weights,
    describe,
)
from fastpref.ops.reference import IGNORE_INDEX, ScoreGeometry, TokenStats
from fastpref.ops.score_sketch import SKETCH_ROWS

__all__ = [
    "IGNORE_INDEX",
    "SKETCH_ROWS",
    "ScoreGeometry",
    "TokenStats",
    "batch_geometry",
    "collision_entropy",
    "implementation",
    "linear_kl",
    "linear_logps",
    "linear_logps_and_scores",
    "score_geometry",
    "segment_sum",
    "token_stats",
]


def linear_logps(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """Log-prob of each label under the head, differentiable in hidden, weight and bias.

        logps[t] = logits[t, labels[t]] - logsumexp(logits[t])
        logits   = cap(logit_scale * (hidden @ weight.T + bias))
        cap(x)   = softcap * tanh(x / softcap), or x without a softcap

    No bit of the value depends on which arguments require a gradient.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device, scale or `impl`.
    """
    head = Head(weight, bias, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_labels(labels, hidden)
    if impl == "reference":
        weight, bias, labels = _for_reference(hidden, head, labels)
        return reference.linear_logps(
            hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
        )
    return logps_op.linear_logps(hidden, head, labels, impl)


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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (T,), (2, min(rows, V), D)
    """Log-probs as of `linear_logps`, bit for bit, and sketches of two sums of scores.

        sums[0] = sketch of the sum over t <  first_rejected of c[t] d logps[t] / d weight
        sums[1] = sketch of the sum over t >= first_rejected of c[t] d logps[t] / d weight

    with c the token weights: constants of any floating dtype, 1 by default. `batch_geometry` turns
    the sums into norms and a cosine; `fastpref.ops.score_sketch` says how large their error is.
    With `rows` None the sums are the scores themselves, (2, V, D). The sums are fp32 (fp64 for fp64
    inputs), carry no gradient, and add up over micro-batches and ranks.

    They are made of the dlogits of the forward pass: `rows` / V of a GEMM over the head, and one
    more where nothing requires a gradient. Raises ValueError, naming the argument, as
    `linear_logps` does, and for a number of tokens or rows out of range.
    """
    head = Head(weight, bias, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_labels(labels, hidden)
    if not 0 <= first_rejected <= len(hidden):
        raise ValueError(
            f"first_rejected: expected a number of tokens from 0 to {len(hidden)}, "
            f"got {first_rejected!r}"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"rows: must be >= 1, or None for exact sums, got {rows!r}")
    if token_weights is not None:
        check_weights(token_weights, hidden)
    if impl == "reference":
        weight, bias, labels = _for_reference(hidden, head, labels)
        return reference.linear_logps_and_scores(
            hidden, weight, labels, first_rejected, token_weights=token_weights, rows=rows,
            bias=bias, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
    return logps_op.linear_logps_and_scores(
        hidden, head, labels, first_rejected, token_weights, rows, impl
    )


def batch_geometry(
    sums: Tensor,  # (2, ...)
    pairs: Tensor | int,
) -> ScoreGeometry:
    """Norms and cosine () of the mean chosen and rejected scores of a number of pairs, fp64.

    sums: summed scores, or sketches of them. The cosine is 0 where a norm is 0. Nothing waits for
    the device; 0 pairs give NaN.
    """
    chosen, rejected = sums.flatten(1)
    # Reduced in fp64 without a copy in fp64.
    chosen_norm, rejected_norm = (
        torch.linalg.vector_norm(side, dtype=torch.float64) for side in (chosen, rejected)
    )
    product = (chosen * rejected).sum(dtype=torch.float64)
    size = chosen_norm * rejected_norm
    cosine = (product / size).masked_fill(size == 0, 0.0).clamp(-1, 1)
    return ScoreGeometry(chosen_norm / pairs, rejected_norm / pairs, cosine)


def token_stats(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> TokenStats:
    """Log-prob, log-sum-exp, entropy and top-1 of each token, without gradient.

        lse[t]     = logsumexp(logits[t])
        entropy[t] = -sum_v p[t, v] log p[t, v],  p = softmax(logits)
        top1[t]    = logits[t, labels[t]] is the largest logit of its row (bool; a tie counts)

    `logps` equals `linear_logps` of the same implementation bit for bit. Raises ValueError as
    `linear_logps` does.
    """
    head = Head(weight, bias, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_labels(labels, hidden)
    if impl == "reference":
        weight, bias, labels = _for_reference(hidden, head.detach(), labels)
        return reference.token_stats(
            hidden.detach(), weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
        )
    return statistics_op.token_stats(hidden, head, labels, impl)


def collision_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """Entropy of order 2 of each token's distribution, in nats, without gradient.

        collision_entropy[t] = -log sum_v p[t, v]^2 = 2 logsumexp(z[t]) - logsumexp(2 z[t])

    with z the logits, so it takes two calls of `token_stats`, the second at twice the logits. The
    labels only say which tokens are ignored. Raises ValueError as `linear_logps` does.
    """
    if impl == "reference":
        head = Head(weight, bias, logit_scale, softcap)
        check_head(hidden, head, rounds_parameters=True)
        check_labels(labels, hidden)
        weight, bias, labels = _for_reference(hidden, head.detach(), labels)
        return reference.collision_entropy(
            hidden.detach(), weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
        )

    def lse_of_scaled_logits(scale: float) -> Tensor:
        return token_stats(
            hidden, weight, labels, bias=bias, logit_scale=scale * logit_scale,
            softcap=None if softcap is None else scale * softcap, impl=impl,
        ).lse  # fmt: skip

    # Rounding may give a result slightly below 0.
    return (2 * lse_of_scaled_logits(1) - lse_of_scaled_logits(2)).clamp(min=0)


def linear_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (T, E)
    ref_weight: Tensor,  # (V, E)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """KL(reference || policy) of each token's distribution, differentiable in the policy.

        kl[t] = sum_v q[t, v] (log q[t, v] - log p[t, v]),  q the reference, p the policy

    Exactly 0, with gradient 0, where both have the same logits. Raises ValueError, naming the
    argument, for a wrong shape, dtype, device, scale or `impl`.
    """
    head = Head(weight, None, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_head(ref_hidden, head._replace(weight=ref_weight), prefix="ref_")
    check_device("ref_hidden", ref_hidden, hidden)
    if len(ref_hidden) != len(hidden):
        raise ValueError(
            f"ref_hidden: expected {len(hidden)} rows, one per token of hidden, "
            f"got {len(ref_hidden)}"
        )
    if len(ref_weight) != len(weight):
        raise ValueError(
            f"ref_weight: expected the policy's vocabulary of {len(weight)} rows, "
            f"got {len(ref_weight)}; KL needs one vocabulary"
        )
    if impl == "reference":
        weight = _rounded(weight, hidden)
        return reference.linear_kl(
            hidden, weight, ref_hidden, ref_weight, logit_scale=logit_scale, softcap=softcap
        )
    return kl_op.linear_kl(hidden, head, ref_hidden, ref_weight, impl)


def score_geometry(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,)
    *,
    token_weights: Tensor | None = None,  # (T,)
    per_pair: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> ScoreGeometry:
    """Norms and cosine of the chosen and rejected scores with respect to the head's weight.

        s = sum over a sequence of c[t] * d logps[t] / d weight     (V, D)

    with c the token weights: constants of any floating dtype, 1 by default.

    Sequences are ordered chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}. The results are
    () for the batch-mean scores, (B,) with `per_pair`; the cosine is 0 where a norm is 0.

    Keep `cu_seqlens` on the CPU, whatever device the rest is on: the sizes of the GEMMs come from
    it, and reading it from a GPU waits for that GPU. Raises ValueError, naming the argument,
    for a wrong shape, dtype, device, scale or `impl`.
    """
    head = Head(weight, None, logit_scale, softcap)
    check_head(hidden, head, rounds_parameters=True)
    check_labels(labels, hidden)
    check_offsets(cu_seqlens, hidden if cu_seqlens.device.type != "cpu" else cu_seqlens)
    if len(cu_seqlens) < 3 or len(cu_seqlens) % 2 == 0:
        raise ValueError(
            f"cu_seqlens: expected 2 B + 1 offsets, B chosen and then B rejected sequences, "
            f"got {len(cu_seqlens)}"
        )
    if token_weights is not None:
        check_weights(token_weights, hidden)
    if impl == "reference":
        weight, _, labels = _for_reference(hidden, head.detach(), labels)
        offsets = offsets_in_range(cu_seqlens, len(hidden)).to(hidden.device)
        return reference.score_geometry(
            hidden.detach(), weight, labels, offsets, token_weights=token_weights,
            per_pair=per_pair, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
    return statistics_op.score_geometry(
        hidden, head, labels, cu_seqlens, token_weights, per_pair, impl
    )


def segment_sum(
    values: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Sum of `values` over each segment, differentiable; an empty segment gives 0.

        sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]

    Deterministic, accumulated in fp64, returned in the dtype of `values`. Raises ValueError,
    naming the argument, for a wrong shape, dtype or device.
    """
    check_plain("values", values)
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values: expected a floating-point vector (T,), got {describe(values)}")
    check_offsets(cu_seqlens, values)
    return segments.segment_sum(values, offsets_in_range(cu_seqlens, len(values)))


def implementation(hidden: Tensor, impl: str = "auto") -> str:
    """Name of the implementation that every op uses for inputs like `hidden`, e.g. "chunked".

    Log-probs agree to the last bit within one implementation, not between two. Raises ValueError
    for an `impl` that does not exist or cannot take the inputs.
    """
    return dispatch.choose(impl, hidden.device.type, hidden.dtype).name


def _for_reference(
    hidden: Tensor, head: Head, labels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and bias as the other implementations round them, and labels as they check them."""
    bias = None if head.bias is None else _rounded(head.bias, hidden)
    return _rounded(head.weight, hidden), bias, labels_in_range(labels, len(head.weight))


def _rounded(parameter: Tensor, hidden: Tensor) -> Tensor:
    """The parameter rounded to the dtype of hidden, with a gradient that is not rounded."""
    if parameter.dtype == hidden.dtype:
        return parameter
    rounding = parameter.detach().to(hidden.dtype).to(parameter.dtype) - parameter.detach()
    return parameter + rounding  # exact: the difference of a number and its rounding is
