"""Objectives that compare each response with an anchor of its own, for the loss kernels.

    (zw, zl, rw, rl, nw, nl, hyperparameters) -> loss, d_w, d_l, chosen reward, rejected reward

Notation, arguments and sources: see `margin` and the plain-PyTorch objectives of the
same names. The two incentives differ.
"""

# mypy: allow-untyped-defs
import math

import triton
import triton.language as tl

from fastpref_kernels.common.numerics import (
    exp_linear,
    indicator,
    log1mexp,
    log_sigmoid,
    ones_like,
    relu,
    sigmoid,
    sigmoid_slope,
)
from fastpref_kernels.losses.margin import LOG_2, log_ratio_rewards

# log(1 - 5e-7): a density ratio of 2 - 1e-6, from which its logarithm is continued.
DDRO_LIMIT = tl.constexpr(math.log((2 - 1e-6) / 2))


@triton.jit
def dpop(zw, zl, rw, rl, nw, nl, beta, lam):
    """-LS(v), v = beta * (tw - tl - lam * max(0, -tw))"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    v = u - lam * relu(-chosen)
    d = beta * sigmoid(-v)
    return -log_sigmoid(v), d * (1.0 + lam * indicator(chosen < 0, v)), d, chosen, rejected


@triton.jit
def cal_dpo(zw, zl, rw, rl, nw, nl, beta):
    """-LS(tw - tl) + ((tw - 1/(2 beta))^2 + (tl + 1/(2 beta))^2) / 2"""
    t_w, t_l, target = zw - rw, zl - rl, 0.5 / beta
    gap_w, gap_l = target - t_w, target + t_l
    loss = -log_sigmoid(t_w - t_l) + (gap_w * gap_w + gap_l * gap_l) / 2.0
    d = sigmoid(t_l - t_w)
    return loss, d + gap_w, d + gap_l, beta * t_w, beta * t_l


@triton.jit
def nca_pair(zw, zl, rw, rl, nw, nl, beta):
    """-LS(beta * tw) - (LS(-beta * tw) + LS(-beta * tl)) / 2"""
    chosen, rejected, _ = log_ratio_rewards(zw, zl, rw, rl, beta)
    loss = -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2.0
    d_w = beta * (sigmoid(-chosen) - sigmoid(chosen) / 2.0)
    return loss, d_w, beta / 2.0 * sigmoid(rejected), chosen, rejected


@triton.jit
def bco_pair(zw, zl, rw, rl, nw, nl, beta):
    """-LS(beta * tw) - LS(-beta * tl)"""
    chosen, rejected, _ = log_ratio_rewards(zw, zl, rw, rl, beta)
    loss = -log_sigmoid(chosen) - log_sigmoid(-rejected)
    return loss, beta * sigmoid(-chosen), beta * sigmoid(rejected), chosen, rejected


@triton.jit
def sppo_hard(zw, zl, rw, rl, nw, nl, beta):
    """(tw - 1/(2 beta))^2 + (tl + 1/(2 beta))^2"""
    chosen, rejected, _ = log_ratio_rewards(zw, zl, rw, rl, beta)
    target = 0.5 / beta
    gap_w, gap_l = target - (zw - rw), target + (zl - rl)
    return gap_w * gap_w + gap_l * gap_l, 2.0 * gap_w, 2.0 * gap_l, chosen, rejected


@triton.jit
def apo_zero(zw, zl, rw, rl, nw, nl, beta):
    """1 - S(beta * tw) + S(beta * tl)"""
    chosen, rejected, _ = log_ratio_rewards(zw, zl, rw, rl, beta)
    loss = sigmoid(-chosen) + sigmoid(rejected)
    return loss, beta * sigmoid_slope(chosen), beta * sigmoid_slope(rejected), chosen, rejected


@triton.jit
def apo_down(zw, zl, rw, rl, nw, nl, beta):
    """S(beta * tw) + 1 - S(u)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    d = beta * sigmoid_slope(u)
    return sigmoid(chosen) + sigmoid(-u), d - beta * sigmoid_slope(chosen), d, chosen, rejected


@triton.jit
def ddro(zw, zl, rw, rl, nw, nl):
    """2 log 2 - tw - log(2 - e^tl), where log(2 - e^t) = log 2 + log(1 - e^(t - log 2))"""
    chosen, rejected = zw - rw, zl - rl
    value, slope = log1mexp(rejected - LOG_2, DDRO_LIMIT)
    return -chosen - value + LOG_2, ones_like(chosen), -slope, chosen, rejected


@triton.jit
def dil_bce(zw, zl, rw, rl, nw, nl):
    """-LS(tw) - LS(-tl)"""
    chosen, rejected = zw - rw, zl - rl
    loss = -log_sigmoid(chosen) - log_sigmoid(-rejected)
    return loss, sigmoid(-chosen), sigmoid(rejected), chosen, rejected


@triton.jit
def dil_ukl(zw, zl, rw, rl, nw, nl):
    """e^tl - tw"""
    chosen, rejected = zw - rw, zl - rl
    value, slope = exp_linear(rejected)
    return value - chosen, ones_like(chosen), slope, chosen, rejected


@triton.jit
def dil_lsif(zw, zl, rw, rl, nw, nl):
    """e^(2 tl) / 2 - e^tw"""
    chosen, rejected = zw - rw, zl - rl
    value_w, slope_w = exp_linear(chosen)
    value_l, slope_l = exp_linear(2.0 * rejected)
    return value_l / 2.0 - value_w, slope_w, slope_l, chosen, rejected


@triton.jit
def from_fair_coin(x):
    """K(x) = KL(fair coin || coin of S(x)), in nats."""
    return -(log_sigmoid(x) + log_sigmoid(-x)) / 2.0 - LOG_2


@triton.jit
def pro_p(zw, zl, rw, rl, nw, nl, beta):
    """(-LS(u) + K(beta * tw) + K(beta * tl)) / 4"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    loss = (-log_sigmoid(u) + from_fair_coin(chosen) + from_fair_coin(rejected)) / 4.0
    d = sigmoid(-u)
    d_w = beta / 4.0 * (d + 0.5 - sigmoid(chosen))
    return loss, d_w, beta / 4.0 * (d - 0.5 + sigmoid(rejected)), chosen, rejected
