"""Objectives on log-probs per token or without a reference, for the loss kernels.

    (zw, zl, rw, rl, nw, nl, hyperparameters) -> loss, d_w, d_l, chosen reward, rejected reward

Notation, arguments and sources: see `margin` and the plain-PyTorch objectives of the
same names. a = z / n, and 0 for an empty response, whose incentive is then 0, too.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.numerics import (
    exp_linear,
    indicator,
    log1mexp,
    log_sigmoid,
    ones_like,
    per_token,
    relu,
    sigmoid,
)
from fastpref_kernels.losses.margin import log_ratio_rewards

ODDS_LIMIT = tl.constexpr(-1e-6)  # the log-prob per token from which the odds are continued


@triton.jit
def mean_rewards(zw, zl, nw, nl, beta):
    """beta * aw and beta * al, and their margin; for log-ratios in place of z those of t / n."""
    chosen, rejected = beta * per_token(zw, nw), beta * per_token(zl, nl)
    return chosen, rejected, chosen - rejected


@triton.jit
def ipo_avg(zw, zl, rw, rl, nw, nl, tau):
    """(tw/nw - tl/nl - 1/(2 tau))^2"""
    chosen, rejected, u = mean_rewards(zw - rw, zl - rl, nw, nl, tau)
    gap = (0.5 - u) / tau
    return gap * gap, per_token(2.0 * gap, nw), per_token(2.0 * gap, nl), chosen, rejected


@triton.jit
def dpo_norm(zw, zl, rw, rl, nw, nl, beta):
    """-LS(u), rewards beta * t / n"""
    chosen, rejected, u = mean_rewards(zw - rw, zl - rl, nw, nl, beta)
    d = beta * sigmoid(-u)
    return -log_sigmoid(u), per_token(d, nw), per_token(d, nl), chosen, rejected


@triton.jit
def simpo(zw, zl, rw, rl, nw, nl, beta, gamma):
    """-LS(u - gamma), rewards beta * a"""
    chosen, rejected, u = mean_rewards(zw, zl, nw, nl, beta)
    d = beta * sigmoid(gamma - u)
    return -log_sigmoid(u - gamma), per_token(d, nw), per_token(d, nl), chosen, rejected


@triton.jit
def slic_hf(zw, zl, rw, rl, nw, nl, delta, lam):
    """max(0, delta - (zw - zl)) - lam * zw"""
    gap = delta - (zw - zl)
    d = indicator(gap > 0, gap)
    return relu(gap) - lam * zw, d + lam, d, zw, zl


@triton.jit
def rrhf(zw, zl, rw, rl, nw, nl, lam, average: tl.constexpr):
    """max(0, al - aw) - lam * zw; z in place of a if not average"""
    if average:
        chosen, rejected = per_token(zw, nw), per_token(zl, nl)
        gap = rejected - chosen
        d = indicator(gap > 0, gap)
        return relu(gap) - lam * zw, per_token(d, nw) + lam, per_token(d, nl), chosen, rejected
    else:
        return slic_hf(zw, zl, rw, rl, nw, nl, tl.zeros_like(zw), lam)


@triton.jit
def cpo(zw, zl, rw, rl, nw, nl, beta, lam):
    """-LS(u) - lam * zw, rewards beta * z"""
    chosen, rejected = beta * zw, beta * zl
    u = chosen - rejected
    d = beta * sigmoid(-u)
    return -log_sigmoid(u) - lam * zw, d + lam, d, chosen, rejected


@triton.jit
def cpo_simpo(zw, zl, rw, rl, nw, nl, beta, gamma, lam):
    """-LS(u - gamma) - lam * aw, rewards beta * a"""
    loss, d_w, d_l, chosen, rejected = simpo(zw, zl, rw, rl, nw, nl, beta, gamma)
    return loss - lam * per_token(zw, nw), d_w + per_token(lam, nw), d_l, chosen, rejected


@triton.jit
def orpo(zw, zl, rw, rl, nw, nl, lam):
    """-aw - lam * LS(o), o = h(aw) - h(al), h(a) = a - log(1 - e^a)"""
    chosen, rejected = per_token(zw, nw), per_token(zl, nl)
    value_w, slope_w = log1mexp(chosen, ODDS_LIMIT)
    value_l, slope_l = log1mexp(rejected, ODDS_LIMIT)
    odds = chosen - rejected - value_w + value_l
    d = lam * sigmoid(-odds)
    d_w, d_l = 1.0 + d * (1.0 - slope_w), d * (1.0 - slope_l)
    loss = -chosen - lam * log_sigmoid(odds)
    return loss, per_token(d_w, nw), per_token(d_l, nl), chosen, rejected


@triton.jit
def simper(zw, zl, rw, rl, nw, nl):
    """e^al - e^aw"""
    chosen, rejected = per_token(zw, nw), per_token(zl, nl)
    value_w, slope_w = exp_linear(chosen)
    value_l, slope_l = exp_linear(rejected)
    return value_l - value_w, per_token(slope_w, nw), per_token(slope_l, nl), chosen, rejected


@triton.jit
def two_sided(u, beta, left_margin, right_margin):
    """-LS(u - left) - LS(right - u) for margins times beta, and beta times minus its slope."""
    above, below = u - beta * left_margin, beta * right_margin - u
    return -log_sigmoid(above) - log_sigmoid(below), beta * (sigmoid(-above) - sigmoid(-below))


@triton.jit
def stapo(zw, zl, rw, rl, nw, nl, beta, left_margin, right_margin):
    """-LS(beta * (Z - left)) - LS(beta * (right - Z)), Z = aw - al"""
    chosen, rejected, u = mean_rewards(zw, zl, nw, nl, beta)
    loss, d = two_sided(u, beta, left_margin, right_margin)
    return loss, per_token(d, nw), per_token(d, nl), chosen, rejected


@triton.jit
def stapo_ref(zw, zl, rw, rl, nw, nl, beta, left_margin, right_margin):
    """-LS(beta * (Z - left)) - LS(beta * (right - Z)), Z = tw - tl"""
    chosen, rejected, u = log_ratio_rewards(zw, zl, rw, rl, beta)
    loss, d = two_sided(u, beta, left_margin, right_margin)
    return loss, d, d, chosen, rejected


@triton.jit
def sft(zw, zl, rw, rl, nw, nl, responses: tl.constexpr, average: tl.constexpr):
    """-aw, or -(aw + al) / 2 for both; z in place of a if not average"""
    chosen, rejected = zw, zl
    d_w, d_l = ones_like(zw), ones_like(zl)
    if average:
        chosen, rejected = per_token(zw, nw), per_token(zl, nl)
        d_w, d_l = per_token(d_w, nw), per_token(d_l, nl)
    if responses == "both":
        return -(chosen + rejected) / 2.0, d_w / 2.0, -d_l / 2.0, chosen, rejected
    else:
        tl.static_assert(responses == "chosen")
        return -chosen, d_w, tl.zeros_like(d_l), chosen, rejected
