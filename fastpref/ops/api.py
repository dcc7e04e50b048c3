"""The ops that users call: each validates its arguments and calls the chosen implementation.

Shapes: T tokens, S sequences, D hidden size, V vocabulary. `hidden` (T, D), `weight` (V, D) and
`bias` (V,) are fp16, bf16, fp32 or fp64, all of one dtype on one device; `labels` (T,) and
`cu_seqlens` (S + 1,) are int32 or int64. Labels are vocabulary indices or -100, which means
"ignored": every statistic is 0 and no gradient flows. Results are fp32 (fp64 for fp64 inputs), in
nats. `fastpref.ops.reference` defines the logits, and how half precision and autocast are treated.

`impl` is "auto" or the name of a row of `fastpref.ops.dispatch.TABLE`. "auto" takes the first
row that is installed and accepts the device and dtype; a named implementation is used or refused,
never replaced.
Only shapes, dtypes and devices are checked: reading a label's value would stall the device. Inside
`torch.compile` an op is one node of the graph.
"""

import math

import torch
from torch import Tensor

from fastpref.ops import dispatch, reference, torch_ops
from fastpref.ops.backend import Head
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

    No bit of the value depends on which arguments require a gradient. Gradients are first-order
    only: a gradient of a gradient raises RuntimeError.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device, scale or `impl`.
    """
    head = Head(weight, bias, logit_scale, softcap)
    _check_head(hidden, head)
    _check_labels(labels, hidden)
    if impl == "reference":
        return reference.linear_logps(
            hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
        )
    return torch_ops.linear_logps(hidden, head, labels, impl)


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
    _check_head(hidden, head)
    _check_labels(labels, hidden)
    if not 0 <= first_rejected <= len(hidden):
        raise ValueError(
            f"first_rejected: expected a number of tokens from 0 to {len(hidden)}, "
            f"got {first_rejected!r}"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"rows: must be >= 1, or None for exact sums, got {rows!r}")
    if token_weights is not None:
        _check_weights(token_weights, hidden)
    if impl == "reference":
        return reference.linear_logps_and_scores(
            hidden, weight, labels, first_rejected, token_weights=token_weights, rows=rows,
            bias=bias, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
    return torch_ops.linear_logps_and_scores(
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
    _check_head(hidden, head)
    _check_labels(labels, hidden)
    if impl == "reference":
        return reference.token_stats(
            hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
        )
    return torch_ops.token_stats(hidden, head, labels, impl)


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
        return reference.collision_entropy(
            hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap
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
    _check_head(hidden, head)
    _check_head(ref_hidden, head._replace(weight=ref_weight), prefix="ref_")
    _check_device("ref_hidden", ref_hidden, hidden)
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
        return reference.linear_kl(
            hidden, weight, ref_hidden, ref_weight, logit_scale=logit_scale, softcap=softcap
        )
    return torch_ops.linear_kl(hidden, head, ref_hidden, ref_weight, impl)


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
    _check_head(hidden, head)
    _check_labels(labels, hidden)
    _check_offsets(cu_seqlens, hidden if cu_seqlens.device.type != "cpu" else cu_seqlens)
    if len(cu_seqlens) < 3 or len(cu_seqlens) % 2 == 0:
        raise ValueError(
            f"cu_seqlens: expected 2 B + 1 offsets, B chosen and then B rejected sequences, "
            f"got {len(cu_seqlens)}"
        )
    if token_weights is not None:
        _check_weights(token_weights, hidden)
    if impl == "reference":
        return reference.score_geometry(
            hidden, weight, labels, cu_seqlens.to(hidden.device), token_weights=token_weights,
            per_pair=per_pair, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
    return torch_ops.score_geometry(hidden, head, labels, cu_seqlens, token_weights, per_pair, impl)


def segment_sum(
    values: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Sum of `values` over each segment, differentiable; an empty segment gives 0.

        sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]

    Deterministic, accumulated in fp64, returned in the dtype of `values`. Raises ValueError,
    naming the argument, for a wrong shape, dtype or device.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values: expected a floating-point vector (T,), got {_describe(values)}")
    _check_offsets(cu_seqlens, values)
    return reference.segment_sum(values, cu_seqlens)


def implementation(hidden: Tensor, impl: str = "auto") -> str:
    """Name of the implementation that every op uses for inputs like `hidden`, e.g. "chunked".

    Log-probs agree to the last bit within one implementation, not between two. Raises ValueError
    for an `impl` that does not exist or cannot take the inputs.
    """
    return dispatch.choose(impl, hidden.device.type, hidden.dtype).name


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def _check_head(hidden: Tensor, head: Head, prefix: str = "") -> None:
    weight, bias, logit_scale, softcap = head
    hidden_name, weight_name = f"{prefix}hidden", f"{prefix}weight"
    if hidden.dim() != 2 or hidden.dtype not in _FLOATS:
        raise ValueError(
            f"{hidden_name}: expected a (T, D) tensor of fp16, bf16, fp32 or fp64, "
            f"got {_describe(hidden)}; flatten batch and time into T"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(
            f"{weight_name}: expected shape (V, {hidden.shape[1]}) with V >= 1 to match "
            f"{hidden_name}, got {tuple(weight.shape)}"
        )
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            f"{weight_name}: got a DTensor, of which this rank holds a shard; call the op inside "
            f"the forward of the FSDP module that owns it, where it is gathered"
        )
    _check_dtype(weight_name, weight, hidden, hidden_name)
    _check_device(weight_name, weight, hidden, hidden_name)
    if bias is not None:
        if bias.shape != (len(weight),):
            raise ValueError(
                f"bias: expected shape ({len(weight)},), one per row of weight, "
                f"got {tuple(bias.shape)}"
            )
        _check_dtype("bias", bias, hidden)
        _check_device("bias", bias, hidden)
    if not _is_real(logit_scale) or logit_scale == 0:
        raise ValueError(
            f"logit_scale: expected a finite number other than 0, got {logit_scale!r}; "
            f"1.0 leaves the logits as they are"
        )
    if softcap is not None and not (_is_real(softcap) and softcap > 0):
        raise ValueError(
            f"softcap: expected a finite number above 0, got {softcap!r}; None means no cap"
        )


def _check_labels(labels: Tensor, hidden: Tensor) -> None:
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"labels: expected int64 or int32, got {labels.dtype}")
    if labels.shape != (len(hidden),):
        raise ValueError(
            f"labels: expected shape ({len(hidden)},), one per row of hidden, "
            f"got {tuple(labels.shape)}"
        )
    _check_device("labels", labels, hidden)


def _check_weights(token_weights: Tensor, hidden: Tensor) -> None:
    if token_weights.shape != (len(hidden),) or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights: expected floating point of shape ({len(hidden)},), one per row of "
            f"hidden, got {_describe(token_weights)}"
        )
    _check_device("token_weights", token_weights, hidden)


def _check_offsets(cu_seqlens: Tensor, tokens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens: expected an int32 or int64 vector of S + 1 offsets starting at 0, "
            f"got {_describe(cu_seqlens)}"
        )
    _check_device("cu_seqlens", cu_seqlens, tokens, "the tokens")


def _check_dtype(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype} like {like_name}, got {tensor.dtype}; cast one of them"
        )


def _check_device(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected to be on {like.device} like {like_name}, got {tensor.device}; "
            f"move one of them"
        )


def _is_real(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}"
