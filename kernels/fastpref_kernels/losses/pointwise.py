"""Objectives on single responses, each labeled desirable or not, for the loss kernels.

    (z, t, desirable, point, hyperparameters) -> loss, d, reward

z is the summed log-prob of a response under the policy, t its log-ratio to the reference and d =
-dL/dz, in closed form; `point` is the reference point of all responses. The caller handles empty
responses. Formulas and sources: see the plain-PyTorch objectives of the same names.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.numerics import (
    log1mexp,
    log_sigmoid,
    ones_like,
    relu,
    sigmoid,
    sigmoid_slope,
)
from fastpref_kernels.losses.anchored import DDRO_LIMIT, from_fair_coin
from fastpref_kernels.losses.margin import LOG_2


@triton.jit
def sign_of(desirable, like):
    """y: 1 for a desirable response and -1 for another one."""
    return tl.where(desirable, ones_like(like), -1.0)


@triton.jit
def kto(z, t, desirable, point, beta, desirable_weight, undesirable_weight):
    """w * (1 - S(y * beta * (t - max(0, point))))"""
    shifted = beta * (t - relu(point))
    y, weight = sign_of(desirable, t), tl.where(desirable, desirable_weight, undesirable_weight)
    return weight * sigmoid(-y * shifted), weight * y * beta * sigmoid_slope(shifted), beta * t


@triton.jit
def kto_simple(z, t, desirable, point, desirable_weight, undesirable_weight):
    """w * S(-y * t)"""
    y, weight = sign_of(desirable, t), tl.where(desirable, desirable_weight, undesirable_weight)
    return weight * sigmoid(-y * t), weight * y * sigmoid_slope(t), t


@triton.jit
def bco(z, t, desirable, point, beta):
    """-LS(y * (beta * t - point))"""
    y = sign_of(desirable, t)
    v = y * (beta * t - point)
    return -log_sigmoid(v), y * beta * sigmoid(-v), beta * t


@triton.jit
def ddro_unpaired(z, t, desirable, point):
    """log 2 - t if desirable, log 2 - log(2 - e^t) if not"""
    value, slope = log1mexp(t - LOG_2, DDRO_LIMIT)
    return tl.where(desirable, -t + LOG_2, -value), tl.where(desirable, 1.0, slope), t


@triton.jit
def pro_b(z, t, desirable, point, beta, alpha, desirable_weight, undesirable_weight):
    """w * (-beta * y/2 * z + alpha * K(beta * t))"""
    y, weight = sign_of(desirable, t), tl.where(desirable, desirable_weight, undesirable_weight)
    reward = beta * t
    loss = weight * (-beta / 2.0 * y * z + alpha * from_fair_coin(reward))
    d = weight * beta * (y - alpha * (sigmoid(reward) - sigmoid(-reward))) / 2.0
    return loss, d, reward
