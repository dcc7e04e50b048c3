"""Loss kernels: objectives on summed log-probs, with incentives, rewards and metric sums."""

from fastpref_kernels.losses.pair import PAIR_METRICS, PairLosses, pair_losses
from fastpref_kernels.losses.registry import PAIR_OBJECTIVES, RESPONSE_OBJECTIVES
from fastpref_kernels.losses.response import RESPONSE_METRICS, ResponseLosses, response_losses

__all__ = [
    "PAIR_METRICS",
    "PAIR_OBJECTIVES",
    "RESPONSE_METRICS",
    "RESPONSE_OBJECTIVES",
    "PairLosses",
    "ResponseLosses",
    "pair_losses",
    "response_losses",
]
