"""Objectives with anchored responses against closed forms, differences, optima, other libraries."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastpref.losses.anchored import (
    DDRO,
    DILBCE,
    DILLSIF,
    DILUKL,
    DPOP,
    OBJECTIVES,
    PROP,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    NCAPair,
    SPPOHard,
)
from fastpref.losses.margin import DPO
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
    nls,
    outputs,
    pairs_of,
    sigmoid,
    tangent,
    with_label,
)

CASES = [
    DPOP(),
    DPOP(beta=0.05, lam=2.0),
    CalDPO(),
    CalDPO(beta=0.1),
    NCAPair(),
    NCAPair(beta=0.5),
    BCOPair(),
    BCOPair(beta=0.5),
    SPPOHard(),
    SPPOHard(beta=0.1),
    APOZero(),
    APOZero(beta=0.5),
    APODown(),
    APODown(beta=0.5),
    DDRO(),
    DILBCE(),
    DILUKL(),
    DILLSIF(),
    PROP(),
    PROP(beta=0.5),
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def from_fair_coin(x):
    return (nls(x) + nls(-x)) / 2 - math.log(2)


def closed_form(o, zw, zl, rw, rl, nw, nl):
    tw, tl = zw - rw, zl - rl
    b = getattr(o, "beta", 1.0)
    x, y, u, target = b * tw, b * tl, b * (tw - tl), 1 / (2 * b)
    match o.name:
        case "dpop":
            v = b * (tw - tl - o.lam * max(0.0, -tw))
            return nls(v), b * sigmoid(-v) * (1 + o.lam * (tw < 0)), b * sigmoid(-v)
        case "cal_dpo":
            loss = nls(tw - tl) + ((tw - target) ** 2 + (tl + target) ** 2) / 2
            pull = sigmoid(tl - tw) + target
            return loss, pull - tw, pull + tl
        case "nca_pair":
            loss = nls(x) + nls(-x) / 2 + nls(-y) / 2
            return loss, b * (sigmoid(-x) - sigmoid(x) / 2), b / 2 * sigmoid(y)
        case "bco_pair" | "dil_bce":
            return nls(x) + nls(-y), b * sigmoid(-x), b * sigmoid(y)
        case "sppo_hard":
            loss = (tw - target) ** 2 + (tl + target) ** 2
            return loss, 2 * (target - tw), 2 * (tl + target)
        case "apo_zero":
            return sigmoid(-x) + sigmoid(y), b * bell(x), b * bell(y)
        case "apo_down":
            return sigmoid(x) + sigmoid(-u), b * bell(u) - b * bell(x), b * bell(u)
        case "ddro":
            # log(2 - e^t) written so that it does not cancel: log 2 + log(1 - e^(t - log 2)).
            pole, slope = tangent(
                lambda t: -math.log(-2 * math.expm1(t - math.log(2))),
                lambda t: -math.exp(t - math.log(2)) / math.expm1(t - math.log(2)),
                tl,
                math.log(2 - 1e-6),
            )
            return 2 * math.log(2) - tw + pole, 1.0, slope
        case "dil_ukl":
            value, slope = exponential(tl)
            return value - tw, 1.0, slope
        case "dil_lsif":
            (rejected, d_l), (chosen, d_w) = exponential(2 * tl), exponential(tw)
            return rejected / 2 - chosen, d_w, d_l
        case "pro_p":
            loss = (nls(u) + from_fair_coin(x) + from_fair_coin(y)) / 4
            s = sigmoid(-u)
            return loss, b / 4 * (s + 0.5 - sigmoid(x)), b / 4 * (s - 0.5 + sigmoid(y))


def test_no_objective_is_left_out():
    assert {type(objective) for objective in CASES} == set(OBJECTIVES)


@every_case
@hard_and_soft
def test_loss_and_incentives_match_the_closed_form(objective, soft):
    assert_matches(closed_form, objective, soft)


@every_case
@hard_and_soft
def test_incentives_match_central_differences(objective, soft):
    # Near the pole of DDRO at 0.69 differences say nothing: stay below 0.4.
    assert_matches_differences(objective, soft, spread=0.15 if objective == DDRO() else 1.0)


@every_case
def test_extreme_ratios_and_lengths_match_the_closed_form(objective):
    # The loss of DIL-LSIF is the difference of two tangents, each up to e^20 * 1e4.
    largest = 5e12 if isinstance(objective, DILLSIF) else 0.0
    assert_matches_at_extremes(closed_form, objective, largest)


@every_case
def test_everything_is_finite(objective):
    assert_finite(objective)


def test_dpop_penalises_a_chosen_response_below_its_reference():
    objective = DPOP(beta=0.3, lam=4.0)
    d_w, d_l = incentives_at(objective, -0.5, 0)
    assert d_w == pytest.approx(5 * d_l)
    d_w, d_l = incentives_at(objective, 0.5, 0)
    assert d_w == d_l == incentives_at(DPO(beta=0.3), 0.5, 0)[0]
    d_w, d_l = incentives_at(objective, 0, 0)  # at the start, t = 0 counts as not below
    assert d_w == d_l == 0.15


def test_dpop_without_penalty_is_dpo():
    policy, reference = batch(soft=True)
    dpop = outputs(DPOP(beta=0.3, lam=0), policy, reference)
    assert_close(dpop, outputs(DPO(beta=0.3), policy, reference), 1e-12)


def test_bco_pair_with_beta_one_is_dil_bce():
    policy, reference = batch(soft=True)
    bco = outputs(BCOPair(beta=1), policy, reference)
    assert_close(bco, outputs(DILBCE(), policy, reference), 1e-12)


def test_apo_zero_with_beta_one_is_kto_of_pairs_in_the_reward_calibration_paper():
    """Eqs. 31 and 32 of arXiv:2604.18239, with both weights 1, as they stand there."""
    policy, reference = batch(spread=1.0)

    def slope(u):
        return u.sigmoid() * (1 - u.sigmoid())

    loss = (reference.chosen - policy.chosen).sigmoid()
    loss += (policy.rejected - reference.rejected).sigmoid()
    d_w = slope(reference.chosen - policy.chosen)
    d_l = slope(policy.rejected - reference.rejected)
    theirs = torch.stack([loss, d_w, d_l], dim=1)
    assert_close(outputs(APOZero(beta=1.0), policy, reference), theirs, 1e-12)
    assert not torch.allclose(outputs(APOZero(), policy, reference), theirs)


def test_the_unit_target_of_nca_pair_is_log_two():
    before, at, beyond = (incentives_at(NCAPair(beta=0.1), t, 0)[0] for t in (6.9, 6.931472, 7))
    assert before > 0 > beyond and abs(at) < 1e-8  # 10 log 2 = 6.9314718


@pytest.mark.parametrize(
    ("objective", "tw", "tl", "p"),
    [
        (SPPOHard(beta=0.1), 5, -5, None),
        (SPPOHard(beta=0.1), 3, -3, 0.8),  # (p - 1/2) / beta
        (BCOPair(beta=0.1), 10 * math.log(4), -10 * math.log(4), 0.8),  # logit(p) / beta
        (NCAPair(beta=0.1), 10 * math.log(1.6), 10 * math.log(0.4), 0.8),  # log(2 p) / beta
    ],
    ids=repr,
)
def test_optima(objective, tw, tl, p):
    d_w, d_l = incentives_at(objective, tw, tl, p)
    assert abs(d_w) < 1e-12 and abs(d_l) < 1e-12


def test_pro_p_has_a_finite_optimum_and_starts_from_an_eighth():
    objective = PROP(beta=0.1)
    assert incentives_at(objective, 0, 0) == pytest.approx((0.1 / 8, 0.1 / 8))
    low, high = 0.0, 2.0  # bisect S(-2 r) + 1/2 = S(r), where both incentives vanish
    while high - low > 1e-12:
        r = (low + high) / 2
        low, high = (r, high) if sigmoid(-2 * r) + 0.5 > sigmoid(r) else (low, r)
    assert r == pytest.approx(0.756, abs=1e-3)
    assert incentives_at(objective, 10 * r, -10 * r) == pytest.approx((0, 0), abs=1e-12)
    assert incentives_at(objective, 0, -40)[1] < 0  # far below: pulled back up


def test_a_soft_label_of_one_half_holds_pro_p_to_the_reference():
    assert incentives_at(PROP(), 0, 0, p=0.5) == (0, 0)
    d_w, d_l = incentives_at(PROP(), 3, -3, p=0.5)
    assert d_w < 0 and d_l < 0


def test_apo_down_lowers_both_responses():
    d_w, d_l = incentives_at(APODown(beta=0.1), 0, -20)
    assert d_w < 0 < d_l
    assert incentives_at(APOZero(beta=0.1), 0, 0) == pytest.approx((0.025, 0.025))


def test_cal_dpo_and_sppo_hard_share_their_targets():
    # At the targets only the logistic term of Cal-DPO is left, S(-10) here.
    d_w, d_l = incentives_at(CalDPO(beta=0.1), 5, -5)
    assert d_w == pytest.approx(sigmoid(-10)) == d_l
    assert incentives_at(SPPOHard(beta=0.1), 5, -5) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("objective", "joint", "cap"),
    [
        (DDRO(), math.log(2 - 1e-6), 1999999),
        (DILUKL(), 20, math.exp(20)),
        (DILLSIF(), 10, math.exp(20)),
    ],
    ids=repr,
)
def test_the_incentive_on_the_rejected_response_is_capped(objective, joint, cap, dtype):
    tl = torch.tensor([-1.0, 0.0, joint, joint + 1e-3, 21, 1e4], dtype=dtype)
    policy = dataclasses.replace(pairs_of(0, 0, dtype=dtype), chosen=0 * tl, rejected=tl)
    reference = dataclasses.replace(policy, rejected=0 * tl)
    d_l = outputs(objective, policy, reference)[:, 2]
    assert (d_l.diff()[:2] > 0).all()
    torch.testing.assert_close(d_l[3:], torch.full_like(d_l[3:], cap), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("objective", "reward"),
    [(DPOP(beta=0.3), 0.3), (CalDPO(beta=0.3), 0.3), (PROP(beta=0.3), 0.3), (DDRO(), 1)],
    ids=repr,
)
def test_rewards(objective, reward):
    policy, reference = batch()
    out = objective(policy, reference)
    assert_close(out.chosen_rewards, reward * (policy.chosen - reference.chosen), 1e-12)
    assert_close(out.rejected_rewards, reward * (policy.rejected - reference.rejected), 1e-12)


LIGER = [NCAPair, BCOPair, SPPOHard, APOZero, APODown]


@pytest.mark.parametrize("objective", [make(beta=0.3) for make in LIGER], ids=repr)
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
        loss_type=objective.name,
    )
    assert_agrees(objective(policy, reference), *theirs)


def test_a_soft_label_reverses_the_penalty_of_dpop_too():
    reversed_pair = with_label(pairs_of(1.0, -1.0), 0.0)
    objective = DPOP(beta=0.3, lam=4.0)
    expected = objective(pairs_of(-1.0, 1.0), pairs_of(0, 0)).loss
    assert_close(objective(reversed_pair, pairs_of(0, 0)).loss, expected, 1e-12)
