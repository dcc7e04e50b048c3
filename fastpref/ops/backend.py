"""The head of a language model, and the methods that a backend implements.

`fastpref.ops.logps_op` and `kl_op` turn the methods into differentiable ops. A backend is the
object `BACKEND` of its module. Methods that end in `_fwd` and `_bwd` write into tensors that the
caller allocated; arguments are checked, on one device and of one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Head(NamedTuple):
    """Parameters of `logits = cap(logit_scale * (hidden @ weight.T + bias))`.

    cap(x) = softcap * tanh(x / softcap), or x without a softcap.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def rows(self, part: slice) -> Head:
        """The same head for a slice of the vocabulary."""
        bias = None if self.bias is None else self.bias[part]
        return self._replace(weight=self.weight[part], bias=bias)

    def detach(self) -> Head:
        """The same head without gradient, in forward mode, too."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)

    def rounded_to(self, dtype: torch.dtype) -> Head:
        """The same head in the dtype of the hidden states, as autocast rounds it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)


class ScoreSketch(NamedTuple):
    """Sums of a batch's scores that a forward pass computes: see `fastpref.ops.score_sketch`.

    The chosen responses' tokens come first.
    """

    sums: Tensor  # (2, rows, D) sketches of the chosen and of the rejected scores, written
    signs: Tensor | None  # (blocks, rows), the dtype of sums; None if rows is V
    first_rejected: int  # number of tokens of the chosen responses
    token_weights: Tensor | None  # (T,) weight of each token in the scores; None means 1

    def sides(self, tokens: slice) -> list[tuple[Tensor, slice]]:
        """Sums and tokens of the chosen and of the rejected responses in a slice of the tokens."""
        middle = min(max(self.first_rejected, tokens.start), tokens.stop)
        spans = slice(tokens.start, middle), slice(middle, tokens.stop)
        return [(out, s) for out, s in zip(self.sums, spans, strict=True) if s.start < s.stop]


class Backend(Protocol):
    """T tokens, D hidden size, V vocabulary; labels are int64, -100 where a token is ignored.

    `dlogits` is d logps[t] / d (h_t . w_v), (T, V): the gradient per unit upstream gradient.
    Ignored tokens may hold NaN; their results are 0. No bit of the log-probs may depend on which
    other results are requested.
    """

    def new_dlogits_cache(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        """Uninitialized dlogits (T, V) of a trained head, kept from forward to backward.

        None if they do not fit: the backward pass then recomputes them.
        """

    def linear_logps_fwd(
        self,
        hidden: Tensor,  # (T, D)
        head: Head,
        labels: Tensor,  # (T,) int64
        logps: Tensor,  # (T,), written
        lse: Tensor,  # (T,), written
        dlogp_dhidden: Tensor | None,  # (T, D), written
        dlogits: Tensor | None,  # (T, V), written
        row_scale: Tensor | None,  # (T,), written; None without dlogits
        sketch: ScoreSketch | None = None,  # sums are written
    ) -> None:
        """Log-probs, log-sum-exps, the inputs of the backward pass, and the sums of scores.

        Token t's gradient by the logits is `row_scale[t] * dlogits[t]`: a backend may leave a
        factor of each row out of the matrix.
        """

    def linear_logps_bwd(
        self,
        grad_logps: Tensor,  # (T,) upstream gradient, 0 where ignored
        hidden: Tensor,  # (T, D)
        head: Head,
        labels: Tensor,  # (T,) int64
        lse: Tensor,  # (T,) of the forward pass
        dlogits: Tensor | None,  # (T, V) of the forward pass; None: recompute them
        row_scale: Tensor | None,  # (T,) of the forward pass
        grad_weight: Tensor | None,  # (V, D), written, in hidden's dtype or a wider one
        grad_bias: Tensor | None,  # (V,), written, likewise
    ) -> None:
        """Gradients of the head's weight and bias."""

    def token_stats(self, hidden: Tensor, head: Head, labels: Tensor) -> Sequence[Tensor]:
        """The four fields of `TokenStats`."""

    def linear_kl_fwd(
        self,
        hidden: Tensor,  # (T, D)
        head: Head,
        ref_hidden: Tensor,  # (T, E)
        ref_weight: Tensor,  # (V, E); scale and softcap are those of `head`
        kl: Tensor,  # (T,), written
        lse: Tensor,  # (T,), written
        ref_lse: Tensor,  # (T,), written
        dkl_dhidden: Tensor | None,  # (T, D), written
    ) -> None:
        """KL(reference || policy) of each token, and both models' log-sum-exps."""

    def linear_kl_bwd(
        self,
        grad_kl: Tensor,  # (T,) upstream gradient
        hidden: Tensor,  # (T, D)
        head: Head,
        ref_hidden: Tensor,  # (T, E)
        ref_weight: Tensor,  # (V, E)
        lse: Tensor,  # (T,) of the forward pass
        ref_lse: Tensor,  # (T,) of the forward pass
        grad_weight: Tensor,  # (V, D), written, in hidden's dtype or a wider one
    ) -> None:
        """Gradient of the policy head's weight."""

    def dlogits_panel(
        self,
        hidden: Tensor,  # (T, D), 0 where ignored
        head: Head,
        labels: Tensor,  # (T,) int64
        lse: Tensor,  # (T,) over the whole vocabulary
        columns: slice,  # n entries of the vocabulary
    ) -> Tensor:  # (T, n)
        """Columns of dlogits, in the dtype of hidden or a wider one."""
