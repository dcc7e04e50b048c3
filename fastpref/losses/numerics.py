"""Exponentials that stay finite: each follows its tangent beyond a stated limit.

Value and slope are continuous at the limit, so training crosses it without a jump. Beyond the limit
the slope is constant: it bounds the incentive.
"""

from __future__ import annotations

import math

from fastpref.utils.lazy_torch import Tensor, logsigmoid, torch

EXP_LIMIT = 20.0  # e^20 = 4.9e8: times a log-ratio of 1e4 and a batch of any size it fits fp32
DDRO_RATIO_LIMIT = 2 - 1e-6  # where the density ratio of a rejected response is continued


def exp_linear(x: Tensor, limit: float = EXP_LIMIT) -> Tensor:
    """e^x up to x = limit, and e^limit * (1 + x - limit) beyond it."""
    return x.clamp(max=limit).exp() + math.exp(limit) * (x - limit).relu()


def log1mexp(x: Tensor, limit: float) -> Tensor:
    """log(1 - e^x) up to x = limit < 0, and its tangent, of slope -1/(e^-limit - 1), beyond it."""
    inside = torch.log(-torch.expm1(x.clamp(max=limit)))
    return inside - (x - limit).relu() / math.expm1(-limit)


def from_fair_coin(x: Tensor) -> Tensor:
    """K(x) = KL(fair coin || coin of S(x)), elementwise, in nats."""
    return -(logsigmoid(x) + logsigmoid(-x)) / 2 - math.log(2)
