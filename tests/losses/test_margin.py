"""Objectives on the log-ratio margin against closed forms, differences, limits, other libraries."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastpref.losses.margin import (
    BPO,
    CDPO,
    DPO,
    FDPO,
    HDPO,
    IPO,
    OBJECTIVES,
    PMO,
    RDPO,
    ChiPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    Robust,
)
from tests.helpers.pairs import (
    assert_agrees,
    assert_close,
    assert_finite,
    assert_matches,
    assert_matches_at_extremes,
    assert_matches_differences,
    batch,
    bell,
    exponential,
    incentives_at,
    logit,
    nls,
    outputs,
    pairs_of,
    rows,
    sigmoid,
    with_label,
)

CASES = [
    DPO(),
    CDPO(beta=0.3, label_smoothing=0.05),
    Robust(),
    Robust(beta=0.5, label_smoothing=0.4),
    IPO(),
    IPO(tau=0.02),
    Hinge(),
    Hinge(beta=0.02),
    EXOPair(),
    EXOPair(beta=0.5, label_smoothing=0.2),
    DiscoPOP(),
    DiscoPOP(beta=0.3, tau=0.5),
    DiscoPOP(beta=0.3, tau=3.0),
    RDPO(),
    RDPO(beta=0.01, alpha=0.5),
    PMO(),
    PMO(alpha=0.05, beta=0.05),
    PMO(alpha=0.5, beta=0.0),
    HDPO(),
    HDPO(beta=0.02, alpha=1.2),
    BPO(),
    BPO(beta=0.5, lam=-0.5, clip_low=0.025),
    BPO(lam=0.0, scale=1.0, clip_low=0.0),
    BPO(beta=0.5, lam=1.0, scale=0.5, clip_low=0.0),
    FDPO(),
    FDPO(divergence="forward_kl"),
    FDPO(beta=0.5, divergence="js"),
    FDPO(divergence="alpha"),
    FDPO(beta=0.02, divergence="alpha", alpha=0.2),
    ChiPO(),
    ChiPO(beta=0.005, r_max=0.2),
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def link(o, t):
    """g(t) and its derivative."""
    if o.name == "chi_po":
        value, slope = exponential(t)
        return value + t, slope + 1
    if o.divergence == "reverse_kl":
        return t, 1.0
    if o.divergence == "js":
        return math.log(2) - nls(t), sigmoid(-t)
    # forward_kl is the limit of the alpha divergence at alpha = 0
    power = (o.alpha if o.divergence == "alpha" else 0.0) - 1
    value, slope = exponential(power * t)
    return (value - 1) / power, slope


def of_margin(o, u, longer):
    """Loss and -dloss/du at u = beta * (tw - tl)."""
    e = getattr(o, "label_smoothing", None)
    match o.name:
        case "dpo":
            return nls(u), sigmoid(-u)
        case "cdpo":
            return (1 - e) * nls(u) + e * nls(-u), 1 - e - sigmoid(u)
        case "robust":
            scale = 1 - 2 * e
            slope = (1 - e) * sigmoid(-u) + e * sigmoid(u)
            return ((1 - e) * nls(u) - e * nls(-u)) / scale, slope / scale
        case "hinge":
            return max(0.0, 1 - u), float(u < 1)
        case "exo_pair":
            chosen = sigmoid(u) * (-nls(u) - math.log(1 - e))
            rejected = sigmoid(-u) * (-nls(-u) - math.log(e))
            return chosen + rejected, -bell(u) * (u - logit(1 - e))
        case "discopop":
            # log of q e^-u, with q = S(u / tau), in which neither factor overflows
            value, slope = exponential(-nls(u / o.tau) - u)
            other = sigmoid(-u / o.tau)
            d = other * sigmoid(-u) + bell(u / o.tau) / o.tau * nls(u)
            return other * nls(u) + value, d - slope * (other / o.tau - 1)
        case "r_dpo":
            return nls(u + o.alpha * longer), sigmoid(-u - o.alpha * longer)
        case "bpo":
            clipped = o.clip_low > 0 and u > -math.log(o.clip_low)
            u = -math.log(o.clip_low) if clipped else u
            power, power_slope = exponential(-(o.lam + 1) * u)
            inverse, inverse_slope = exponential(o.lam * u)
            loss = power / (o.lam + 1) - (inverse / o.lam if o.lam else u)
            return loss / o.scale, (not clipped) * (power_slope + inverse_slope) / o.scale


def closed_form(o, zw, zl, rw, rl, nw, nl):
    tw, tl = zw - rw, zl - rl
    match o.name:
        case "ipo":
            gap = 1 / (2 * o.tau) - (tw - tl)
            return gap**2, 2 * gap, 2 * gap
        case "pmo":
            v = (o.alpha + o.beta) * (zw - zl) - o.beta * (rw - rl)
            d = (o.alpha + o.beta) * sigmoid(-v)
            return nls(v), d, d
        case "h_dpo":
            v = o.beta * (o.alpha * (zw - zl) - (rw - rl))
            return nls(v), o.alpha * o.beta * sigmoid(-v), o.alpha * o.beta * sigmoid(-v)
        case "f_dpo" | "chi_po":
            (gw, slope_w), (gl, slope_l) = link(o, tw), link(o, tl)
            u, inside = o.beta * (gw - gl), True
            if o.name == "chi_po":
                inside, u = abs(u) <= 2 * o.r_max, max(-2 * o.r_max, min(2 * o.r_max, u))
            d = o.beta * sigmoid(-u) * inside
            return nls(u), d * slope_w, d * slope_l
    loss, slope = of_margin(o, o.beta * (tw - tl), nw - nl)
    return loss, o.beta * slope, o.beta * slope


def test_no_objective_is_left_out():
    assert {type(objective) for objective in CASES} == set(OBJECTIVES)


@every_case
@hard_and_soft
def test_loss_and_incentives_match_the_closed_form(objective, soft):
    assert_matches(closed_form, objective, soft)


@every_case
@hard_and_soft
def test_incentives_match_central_differences(objective, soft):
    assert_matches_differences(objective, soft)


@every_case
def test_extreme_ratios_and_lengths_match_the_closed_form(objective):
    assert_matches_at_extremes(closed_form, objective)


@every_case
def test_everything_is_finite(objective):
    assert_finite(objective)


@pytest.mark.parametrize("p", [0.03, 0.5, 0.8])
@pytest.mark.parametrize(
    ("objective", "optimum"),  # optimum: p -> the margin tw - tl at which nothing pulls
    [
        (DPO(beta=0.3), lambda p: logit(p) / 0.3),
        (CDPO(beta=0.3, label_smoothing=0.1), lambda p: logit(0.9 * p + 0.1 * (1 - p)) / 0.3),
        (IPO(tau=0.2), lambda p: (p - 0.5) / 0.2),
        (PMO(alpha=0.2, beta=0.1), lambda p: logit(p) / 0.3),
        (EXOPair(beta=0.3, label_smoothing=0.1), lambda p: (2 * p - 1) * logit(0.9) / 0.3),
        (BPO(beta=0.3, lam=0.7), lambda p: logit(p) / 0.3),
    ],
    ids=["dpo", "cdpo", "ipo", "pmo", "exo_pair", "bpo"],
)
def test_a_soft_label_moves_the_optimum(objective, optimum, p):
    reference = pairs_of(0, 0)
    at = [pairs_of(optimum(p) + step, 0, p=p) for step in (0.0, -0.1, 0.1)]
    d_w, d_l = incentives_at(objective, optimum(p), 0, p)
    assert abs(d_w) < 1e-12 and abs(d_l) < 1e-12
    here, below, above = (objective(policy, reference).loss.item() for policy in at)
    assert here < below and here < above


@hard_and_soft
@pytest.mark.parametrize(
    ("objective", "same"),
    [
        (CDPO(beta=0.3, label_smoothing=0), DPO(beta=0.3)),
        (Robust(beta=0.3, label_smoothing=0), DPO(beta=0.3)),
        (RDPO(beta=0.3, alpha=0), DPO(beta=0.3)),
        (PMO(alpha=0, beta=0.3), DPO(beta=0.3)),
        (HDPO(beta=0.3, alpha=1), DPO(beta=0.3)),
        (PMO(alpha=0.2, beta=0.05), HDPO(beta=0.05, alpha=5)),  # alpha = (a + b) / b
        (FDPO(beta=0.3), DPO(beta=0.3)),
    ],
    ids=repr,
)
def test_special_cases(objective, same, soft):
    policy, reference = batch(soft=soft)
    assert_close(outputs(objective, policy, reference), outputs(same, policy, reference), 1e-12)


def test_cdpo_is_dpo_with_a_constant_soft_label():
    policy, reference = batch()
    cdpo = outputs(CDPO(beta=0.3, label_smoothing=0.15), policy, reference)
    assert_close(cdpo, outputs(DPO(beta=0.3), with_label(policy, 0.85), reference), 1e-12)


def test_robust_is_dpo_in_expectation_over_flipped_labels():
    policy, reference = batch()
    robust = Robust(beta=0.3, label_smoothing=0.15)
    flipped = outputs(robust, with_label(policy, 0.85), reference)
    assert_close(flipped, outputs(DPO(beta=0.3), policy, reference), 1e-12)


def test_incentives_of_robust_never_vanish():
    robust = Robust(beta=0.5, label_smoothing=0.1)
    low, high = 0.5 * 0.1 / 0.8, 0.5 * 0.9 / 0.8
    assert incentives_at(robust, 1e4, 0) == pytest.approx((low, low))
    assert incentives_at(robust, -1e4, 0) == pytest.approx((high, high))
    assert low < incentives_at(robust, 3, 0)[0] < incentives_at(robust, -3, 0)[0] < high


def test_exo_pair_leaves_pairs_alone_that_are_far_off_on_either_side():
    exo = EXOPair(beta=0.1)
    before, start, past, beyond = (incentives_at(exo, t, 0)[0] for t in (-900, 0, 80, 900))
    assert start == pytest.approx(0.1 / 4 * logit(0.999))
    assert past < 0  # u = 8 is beyond the optimum, logit(0.999) = 6.9
    assert abs(before) < 1e-30 and abs(beyond) < 1e-30


def test_discopop_pulls_back_in_a_narrow_band_only():
    objective = DiscoPOP()
    u = torch.linspace(-2, 2, 401, dtype=torch.float64)
    tw = u / objective.beta
    policy = dataclasses.replace(pairs_of(0, 0), chosen=tw, rejected=torch.zeros_like(tw))
    reference = dataclasses.replace(policy, chosen=policy.rejected)
    d_w = outputs(objective, policy, reference)[:, 1]
    band = u[d_w < 0]
    # The formula of d_w changes its sign at -0.1185 and 0.0720.
    assert band.min().item() == pytest.approx(-0.11) and band.max().item() == pytest.approx(0.07)
    assert len(band) == 19


def test_hinge_is_satisfied_by_a_margin_of_one():
    assert incentives_at(Hinge(beta=0.5), 1.99, 0) == (0.5, 0.5)
    assert incentives_at(Hinge(beta=0.5), 2.01, 0) == (0, 0)


def test_r_dpo_asks_more_of_a_shorter_chosen_response():
    reference = pairs_of(0, 0)
    short, equal, long = (
        RDPO()(pairs_of(0, 0, nw, 30), reference).loss.item() for nw in (10, 30, 50)
    )
    assert short > equal == pytest.approx(math.log(2)) and equal > long


@pytest.mark.parametrize(
    ("objective", "h", "slope", "scale"),
    [
        (
            BPO(lam=0.7, scale=4, clip_low=0),
            lambda R: (R**1.7 - 1.7 * R + 0.7) / (4 * 0.7 * 1.7),
            lambda R: (R**0.7 - 1) / (4 * 0.7),
            1,
        ),
        (BPO(lam=0, scale=1, clip_low=0), lambda R: R * math.log(R) - R, math.log, 1),
        (BPO(lam=1, scale=0.5, clip_low=0), lambda R: R * R, lambda R: 2 * R, 1),
        (
            DPO(),
            lambda R: R * math.log(R) - (1 + R) * math.log1p(R),
            lambda R: math.log(R / (1 + R)),
            2,
        ),
    ],
    ids=["basu", "kliep", "lsif", "logistic"],
)
def test_bpo_is_the_bregman_divergence_of_its_generator(objective, h, slope, scale):
    """h'(R) R - h(R) - h'(1/R) up to a constant, which for the logistic h is twice DPO."""
    policy, reference = batch(spread=3.0)
    ratios = [
        math.exp(-0.1 * (zw - rw - zl + rl)) for zw, zl, rw, rl, *_ in rows(policy, reference)
    ]
    expected = [(slope(R) * R - h(R) - slope(1 / R)) / scale for R in ratios]
    difference = objective(policy, reference).loss - torch.tensor(expected, dtype=torch.float64)
    assert_close(difference, difference[:1].expand_as(difference), 1e-10)


def test_bpo_does_not_pull_where_the_ratio_is_clipped():
    at = -math.log(0.01) / 0.1
    assert incentives_at(BPO(), at - 1e-6, 0)[0] > 5
    assert incentives_at(BPO(), at + 1e-6, 0) == (0, 0)
    assert incentives_at(BPO(clip_low=0), at + 1e-6, 0)[0] > 5


@pytest.mark.parametrize(("alpha", "divergence"), [(1 - 1e-9, "reverse_kl"), (1e-9, "forward_kl")])
def test_the_alpha_divergence_lies_between_the_two_kls(alpha, divergence):
    policy, reference = batch(spread=1.0)
    ours = outputs(FDPO(divergence="alpha", alpha=alpha), policy, reference)
    # The divergences differ by about alpha * t^2, with |t| < 4.
    assert_close(ours, outputs(FDPO(divergence=divergence), policy, reference), 1e-6)


def test_chi_po_stops_at_its_bounds():
    objective = ChiPO(beta=0.05, r_max=1.0)  # the bound of u is 2: e^t + t = 41 at t = 3.62
    (before, _), (beyond, _) = incentives_at(objective, 3.6, 0), incentives_at(objective, 3.7, 0)
    assert before > 0.1 and beyond == 0
    assert incentives_at(objective, 0, 3.7) == (0, 0)


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        (DPO(beta=0.3), lambda z, r: 0.3 * (z - r)),
        (CDPO(beta=0.3), lambda z, r: 0.3 * (z - r)),
        (IPO(tau=0.3), lambda z, r: 0.3 * (z - r)),
        (RDPO(beta=0.3), lambda z, r: 0.3 * (z - r)),
        (PMO(alpha=0.5, beta=0.1), lambda z, r: 0.6 * z - 0.1 * r),
        (HDPO(beta=0.1, alpha=0.5), lambda z, r: 0.05 * z - 0.1 * r),
        (FDPO(divergence="forward_kl"), lambda z, r: 0.1 * (1 - (r - z).exp())),
        (FDPO(divergence="js"), lambda z, r: 0.1 * (2 / (1 + (r - z).exp())).log()),
        (ChiPO(), lambda z, r: 0.05 * ((z - r).exp() + z - r)),
    ],
    ids=lambda x: repr(x) if dataclasses.is_dataclass(x) else "",
)
def test_rewards(objective, reward):
    policy, reference = batch()
    out = objective(policy, reference)
    assert_close(out.chosen_rewards, reward(policy.chosen, reference.chosen), 1e-12)
    assert_close(out.rejected_rewards, reward(policy.rejected, reference.rejected), 1e-12)


LIGER = [
    DPO(beta=0.3),
    Robust(beta=0.3, label_smoothing=0.2),
    Hinge(beta=0.3),
    EXOPair(beta=0.3, label_smoothing=0.2),
    DiscoPOP(beta=0.3, tau=0.05),
]


@pytest.mark.parametrize("objective", LIGER, ids=repr)
def test_agrees_with_liger(objective):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss", reason="no liger-kernel")
    policy, reference = batch()
    theirs = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        policy.chosen,
        policy.rejected,
        torch.empty(64, 1),  # it reads the number of sequences off this one
        reference.chosen,
        reference.rejected,
        beta=0.3,
        loss_type={"dpo": "sigmoid"}.get(objective.name, objective.name),
        label_smoothing=0.2,
    )
    # It holds the label smoothing of EXO in fp32.
    tolerance = 1e-6 if isinstance(objective, EXOPair) else 1e-12
    assert_agrees(objective(policy, reference), *theirs, tolerance)
