"""The operations as `fastpref.ops` calls them: arguments arrive checked, results are filled in."""

import torch
from torch import Tensor

from fastpref_kernels.common.launch import aligned_rows, launching_on
from fastpref_kernels.dlogits import linear_delta
from fastpref_kernels.linear_kl import linear_kl_bwd, linear_kl_fwd
from fastpref_kernels.linear_logps import kept_deltas, linear_logps_bwd, linear_logps_fwd
from fastpref_kernels.softmax_stats import TokenStats, linear_softmax_fwd


class TritonBackend:
    """T tokens, D hidden size, V vocabulary; inputs are bf16, fp16 or fp32, statistics fp32."""

    kept_deltas = staticmethod(kept_deltas)
    linear_logps_fwd = staticmethod(linear_logps_fwd)
    linear_logps_bwd = staticmethod(linear_logps_bwd)
    linear_kl_fwd = staticmethod(linear_kl_fwd)
    linear_kl_bwd = staticmethod(linear_kl_bwd)

    @staticmethod
    def token_stats(
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (T,)
        bias: Tensor | None,  # (V,)
        logit_scale: float,
        softcap: float | None,
    ) -> TokenStats:
        """Log-prob of each label, log-sum-exp, entropy and top-1, in one pass over the head."""
        with launching_on(hidden):
            return linear_softmax_fwd(hidden, weight, labels, bias, logit_scale, softcap, full=True)

    @staticmethod
    def delta_panel(
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (n, D): rows of the head from `first` on
        labels: Tensor,  # (T,)
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,  # (T,) over the whole head
        first: int,
    ) -> Tensor:  # (T, n)
        """Columns of d logps[t] / d (h_t . w_v), in the dtype of hidden."""
        delta = aligned_rows(hidden.shape[0], weight.shape[0], hidden)
        with launching_on(hidden), torch.no_grad():
            return linear_delta(
                hidden, weight, labels, None, logit_scale, softcap, lse, delta, first
            )


BACKEND = TritonBackend()
