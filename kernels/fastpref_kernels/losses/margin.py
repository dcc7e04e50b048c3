"""Objectives on the margin of two log-ratios, for the loss kernels.

    (zw, zl, rw, rl, nw, nl, hyperparameters) -> loss, d_w, d_l, chosen reward, rejected reward

zw, zl are the summed log-probs of the chosen and the rejected response under the policy, rw, rl
under the reference, nw, nl the token counts, all blocks of one dtype; so is every hyperparameter,
except a choice, which is a constexpr and comes last. With t = z - r, d_w = -dL/dzw and
d_l = dL/dzl, in closed form. A function stores nothing; a pair needs a handful of registers.

Formulas and sources are those of the plain-PyTorch objectives of the same names. Here u is the
margin of the rewards and d the incentive that both responses share.
"""

# mypy: allow-untyped-defs
import math

import triton
import triton.language as tl

from fastpref_kernels.common.numerics import (
    exp_linear,
    indicator,
    log1p,
    log_sigmoid,
    ones_like,
    relu,
    sigmoid,
    sigmoid_slope,
)

LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def log_ratio_rewards(zw, zl, rw, rl, beta):
    """beta * tw and beta * tl, and their margin."""
    chosen, rejected = beta * (zw - rw), beta * (zl - rl)
    return chosen, rejected, chosen - rejected


@triton.jit
def dpo(zw, zl, rw, rl, nw, nl, beta):
    """-LS(u)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    d = beta * sigmoid(-u)
    return -log_sigmoid(u), d, d, chosen, rejected


@triton.jit
def cdpo(zw, zl, rw, rl, nw, nl, beta, label_smoothing):
    """-(1 - e) * LS(u) - e * LS(-u)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    e = label_smoothing
    loss = -(1.0 - e) * log_sigmoid(u) - e * log_sigmoid(-u)
    d = beta * ((1.0 - e) * sigmoid(-u) - e * sigmoid(u))
    return loss, d, d, chosen, rejected


@triton.jit
def robust(zw, zl, rw, rl, nw, nl, beta, label_smoothing):
    """(-(1 - e) * LS(u) + e * LS(-u)) / (1 - 2 e)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    e, scale = label_smoothing, 1.0 - 2.0 * label_smoothing
    loss = (e * log_sigmoid(-u) - (1.0 - e) * log_sigmoid(u)) / scale
    d = beta * ((1.0 - e) * sigmoid(-u) + e * sigmoid(u)) / scale
    return loss, d, d, chosen, rejected


@triton.jit
def ipo(zw, zl, rw, rl, nw, nl, tau):
    """(tw - tl - 1/(2 tau))^2"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, tau)
    gap = (0.5 - u) / tau
    return gap * gap, 2.0 * gap, 2.0 * gap, chosen, rejected


@triton.jit
def hinge(zw, zl, rw, rl, nw, nl, beta):
    """max(0, 1 - u)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    d = beta * indicator(u < 1.0, u)
    return relu(1.0 - u), d, d, chosen, rejected


@triton.jit
def exo_pair(zw, zl, rw, rl, nw, nl, beta, label_smoothing):
    """S(u) * (LS(u) - log(1 - e)) + S(-u) * (LS(-u) - log(e))"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    log_correct, log_flipped = log1p(-label_smoothing), tl.log(label_smoothing)
    loss = sigmoid(u) * (log_sigmoid(u) - log_correct)
    loss += sigmoid(-u) * (log_sigmoid(-u) - log_flipped)
    d = beta * sigmoid_slope(u) * (log_correct - log_flipped - u)
    return loss, d, d, chosen, rejected


@triton.jit
def discopop(zw, zl, rw, rl, nw, nl, beta, tau):
    """-(1 - q) * LS(u) + q * e^-u, q = S(u / tau)"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    value, slope = exp_linear(log_sigmoid(u / tau) - u)
    rest = sigmoid(-u / tau)  # 1 - q
    loss = value - rest * log_sigmoid(u)
    blend = sigmoid_slope(u / tau) / tau * log_sigmoid(u)
    d = beta * (rest * sigmoid(-u) - blend + slope * (1.0 - rest / tau))
    return loss, d, d, chosen, rejected


@triton.jit
def r_dpo(zw, zl, rw, rl, nw, nl, beta, alpha):
    """-LS(u + alpha * (nw - nl))"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    v = u + alpha * (nw - nl)
    d = beta * sigmoid(-v)
    return -log_sigmoid(v), d, d, chosen, rejected


@triton.jit
def pmo(zw, zl, rw, rl, nw, nl, alpha, beta):
    """-LS(u), rewards alpha * z + beta * t"""
    chosen, rejected = alpha * zw + beta * (zw - rw), alpha * zl + beta * (zl - rl)
    u = chosen - rejected
    d = (alpha + beta) * sigmoid(-u)
    return -log_sigmoid(u), d, d, chosen, rejected


@triton.jit
def h_dpo(zw, zl, rw, rl, nw, nl, beta, alpha, alpha_less_1):
    """-LS(u), rewards beta * (alpha * z - r), in which nearly equal numbers cancel first"""
    chosen = beta * (alpha_less_1 * zw + (zw - rw))
    rejected = beta * (alpha_less_1 * zl + (zl - rl))
    u = chosen - rejected
    d = alpha * beta * sigmoid(-u)
    return -log_sigmoid(u), d, d, chosen, rejected


@triton.jit
def bpo(zw, zl, rw, rl, nw, nl, beta, lam, scale, clip_low):
    """R^(lam + 1) / (s * (lam + 1)) - R^-lam / (s * lam), R = e^-u, not below clip_low"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    limit = -tl.log(clip_low)  # infinite where nothing is clipped
    v = tl.where(u > limit, limit, u)
    power, power_slope = exp_linear(-(lam + 1.0) * v)
    inverse, inverse_slope = exp_linear(lam * v)
    inverse = tl.where(lam == 0.0, v, inverse / tl.where(lam == 0.0, 1.0, lam))
    loss = (power / (lam + 1.0) - inverse) / scale
    d = tl.where(u > limit, 0.0, beta * (power_slope + inverse_slope) / scale)
    return loss, d, d, chosen, rejected


@triton.jit
def f_dpo_link(t, alpha, divergence: tl.constexpr):
    """g(t), which is 0 where the policy agrees with the reference, and g'(t)."""
    if divergence == "forward_kl":
        value, slope = exp_linear(-t)
        return 1.0 - value, slope
    elif divergence == "js":
        return log_sigmoid(t) + LOG_2, sigmoid(-t)
    elif divergence == "alpha":
        value, slope = exp_linear((alpha - 1.0) * t)
        return (value - 1.0) / (alpha - 1.0), slope
    else:
        tl.static_assert(divergence == "reverse_kl")
        return t, ones_like(t)


@triton.jit
def f_dpo(zw, zl, rw, rl, nw, nl, beta, alpha, divergence: tl.constexpr):
    """-LS(u), rewards beta * g(t)"""
    link_w, slope_w = f_dpo_link(zw - rw, alpha, divergence)
    link_l, slope_l = f_dpo_link(zl - rl, alpha, divergence)
    chosen, rejected = beta * link_w, beta * link_l
    u = chosen - rejected
    d = beta * sigmoid(-u)
    return -log_sigmoid(u), d * slope_w, d * slope_l, chosen, rejected


@triton.jit
def chi_po(zw, zl, rw, rl, nw, nl, beta, r_max):
    """-LS(v), v = u within [-2 r_max, 2 r_max], rewards beta * (e^t + t)"""
    exp_w, slope_w = exp_linear(zw - rw)
    exp_l, slope_l = exp_linear(zl - rl)
    chosen, rejected = beta * (exp_w + (zw - rw)), beta * (exp_l + (zl - rl))
    u, bound = chosen - rejected, 2.0 * r_max
    v = tl.where(u > bound, bound, tl.where(u < -bound, -bound, u))
    d = tl.where(u == v, beta * sigmoid(-v), 0.0)
    return -log_sigmoid(v), d * (slope_w + 1.0), d * (slope_l + 1.0), chosen, rejected
