"""The methods of a backend; `fastpref.ops.torch_ops` makes differentiable ops of them.

`BACKEND` of its module has these methods. Those ending in `_fwd` and `_bwd` fill in tensors that
the caller made; arguments are checked, on one device and of one dtype.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """T tokens, D hidden size, V vocabulary; labels are int64, -100 where a token is ignored.

    A delta is d logps[t] / d (h_t . w_v), (T, V). Ignored tokens may hold NaN; their results are 0.
    The log-probs must not depend, in any bit, on which of the other results are wanted.
    """

    def kept_deltas(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        """Room for a trained head's deltas from forward to backward; None: made again instead."""

    def linear_logps_fwd(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (T,) int64
        bias: Tensor | None,  # (V,)
        logit_scale: float,
        softcap: float | None,
        logps: Tensor,  # (T,), filled in
        lse: Tensor,  # (T,), filled in
        direction: Tensor | None,  # (T, D), filled in: d logps[t] / d h_t
        deltas: Tensor | None,  # (T, V), filled in
    ) -> None:
        """What lse and deltas hold is between this and the backward pass, which alone reads them:
        by default the log-sum-exps and the deltas."""

    def linear_logps_bwd(
        self,
        gain: Tensor,  # (T,) upstream gradient, 0 where ignored
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (T,) int64
        bias: Tensor | None,  # (V,)
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,  # (T,) and
        deltas: Tensor | None,  # (T, V) as the forward pass left them
        grad_weight: Tensor | None,  # (V, D), filled in
        grad_bias: Tensor | None,  # (V,), filled in
    ) -> None: ...

    def token_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
    ) -> Sequence[Tensor]:
        """The four fields of `TokenStats`."""

    def linear_kl_fwd(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        ref_hidden: Tensor,  # (T, E)
        ref_weight: Tensor,  # (V, E)
        logit_scale: float,
        softcap: float | None,
        kl: Tensor,  # (T,), filled in
        lse: Tensor,  # (T,), filled in
        ref_lse: Tensor,  # (T,), filled in
        direction: Tensor | None,  # (T, D), filled in: d kl[t] / d h_t
    ) -> None: ...

    def linear_kl_bwd(
        self,
        gain: Tensor,  # (T,)
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,  # (T,)
        ref_lse: Tensor,  # (T,)
        grad_weight: Tensor,  # (V, D), filled in
    ) -> None: ...

    def delta_panel(
        self,
        hidden: Tensor,  # (T, D), 0 where ignored
        weight: Tensor,  # (n, D): rows of the head from `first` on
        labels: Tensor,  # (T,) int64
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,  # (T,) over the whole head
        first: int,
    ) -> Tensor:
        """Those columns of the deltas, (T, n), in the dtype of hidden or a wider one."""
