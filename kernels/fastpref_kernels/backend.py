"""The backend that `fastpref.ops` calls: arguments arrive checked, outputs are preallocated."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpref_kernels.common.launch import aligned_rows, launching_on
from fastpref_kernels.dlogits import linear_dlogits
from fastpref_kernels.linear_kl import linear_kl_bwd, linear_kl_fwd
from fastpref_kernels.linear_logps import linear_logps_bwd, linear_logps_fwd, new_dlogits_cache
from fastpref_kernels.softmax_stats import TokenStats, linear_softmax_fwd

if TYPE_CHECKING:
    from fastpref.ops.backend import Head


class TritonBackend:
    """T tokens, D hidden size, V vocabulary; inputs are bf16, fp16 or fp32, statistics fp32."""

    new_dlogits_cache = staticmethod(new_dlogits_cache)
    linear_logps_fwd = staticmethod(linear_logps_fwd)
    linear_logps_bwd = staticmethod(linear_logps_bwd)
    linear_kl_fwd = staticmethod(linear_kl_fwd)
    linear_kl_bwd = staticmethod(linear_kl_bwd)

    @staticmethod
    def token_stats(
        hidden: Tensor,  # (T, D)
        head: "Head",
        labels: Tensor,  # (T,)
    ) -> TokenStats:
        """Log-prob of each label, log-sum-exp, entropy and top-1, from one GEMM over the head."""
        with launching_on(hidden):
            return linear_softmax_fwd(hidden, head, labels, full=True)

    @staticmethod
    def dlogits_panel(
        hidden: Tensor,  # (T, D)
        head: "Head",
        labels: Tensor,  # (T,)
        lse: Tensor,  # (T,) over the whole vocabulary
        columns: slice,  # n entries of the vocabulary
    ) -> Tensor:  # (T, n)
        """Columns of d logps[t] / d (h_t . w_v), in the dtype of hidden."""
        panel = aligned_rows(hidden.shape[0], columns.stop - columns.start, hidden)
        with launching_on(hidden), torch.no_grad():
            return linear_dlogits(hidden, head.rows(columns), labels, lse, panel, columns.start)


BACKEND = TritonBackend()
