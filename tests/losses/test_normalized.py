"""Objectives per token or without a reference against closed forms, limits, other libraries."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fastpref import losses
from fastpref.logps import SequenceLogps
from fastpref.losses.margin import DPO, IPO, PMO
from fastpref.losses.normalized import (
    CPO,
    OBJECTIVES,
    ORPO,
    RRHF,
    SFT,
    CPOSimPO,
    DPONorm,
    IPOAvg,
    LogPiDPO,
    SimPER,
    SimPO,
    SLiCHF,
    StaPO,
    StaPORef,
)
from tests.helpers.pairs import (
    assert_agrees,
    assert_close,
    assert_finite,
    assert_matches,
    assert_matches_at_extremes,
    assert_matches_differences,
    averaged,
    batch,
    exponential,
    means,
    nls,
    outputs,
    pairs_of,
    per,
    sigmoid,
    tangent,
    with_label,
)

CASES = [
    LogPiDPO(),
    LogPiDPO(beta=1.0),
    IPOAvg(),
    IPOAvg(tau=0.02),
    DPONorm(),
    DPONorm(beta=0.5),
    SimPO(),
    SimPO(beta=10.0, gamma=-3.0),
    SLiCHF(),
    SLiCHF(delta=20.0, lam=0.0),
    RRHF(),
    RRHF(lam=0.01),
    RRHF(lam=0.3, average=False),
    CPO(),
    CPO(beta=0.4, lam=0.0),
    CPOSimPO(),
    CPOSimPO(beta=2.0, gamma=1.0, lam=0.3),
    ORPO(),
    ORPO(lam=2.0),
    SimPER(),
    StaPO(),
    StaPO(beta=0.7, left_margin=-1.0, right_margin=2.5),
    StaPORef(),
    StaPORef(beta=0.7, left_margin=-1.0, right_margin=2.5),
    SFT(),
    SFT(average=False),
    SFT(responses="both"),
    SFT(responses="both", average=False),
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def log_odds(a):
    """log(e^a / (1 - e^a)) and its derivative, continued above a = -1e-6."""
    return tangent(lambda a: a - math.log(-math.expm1(a)), lambda a: -1 / math.expm1(a), a, -1e-6)


def closed_form(o, zw, zl, rw, rl, nw, nl):
    aw, al, mw, ml = per(zw, nw), per(zl, nl), per(zw - rw, nw), per(zl - rl, nl)
    match o.name:
        case "logpi_dpo":
            d = o.beta * sigmoid(-o.beta * (zw - zl))
            return nls(o.beta * (zw - zl)), d, d
        case "ipo_avg":
            gap = 1 / (2 * o.tau) - (mw - ml)
            return gap**2, per(2 * gap, nw), per(2 * gap, nl)
        case "dpo_norm":
            u = o.beta * (mw - ml)
            return nls(u), per(o.beta * sigmoid(-u), nw), per(o.beta * sigmoid(-u), nl)
        case "simpo" | "cpo_simpo":
            v = o.beta * (aw - al) - o.gamma
            d, lam = o.beta * sigmoid(-v), getattr(o, "lam", 0.0)
            return nls(v) - lam * aw, per(d + lam, nw), per(d, nl)
        case "slic_hf":
            gap = o.delta - (zw - zl)
            return max(0.0, gap) - o.lam * zw, (gap > 0) + o.lam, float(gap > 0)
        case "rrhf":
            if not o.average:
                return max(0.0, zl - zw) - o.lam * zw, (zw < zl) + o.lam, float(zw < zl)
            loss = max(0.0, al - aw) - o.lam * zw
            return loss, per(float(aw < al), nw) + o.lam, per(float(aw < al), nl)
        case "cpo":
            d = o.beta * sigmoid(-o.beta * (zw - zl))
            return nls(o.beta * (zw - zl)) - o.lam * zw, d + o.lam, d
        case "orpo":
            (chosen, slope_w), (rejected, slope_l) = log_odds(aw), log_odds(al)
            d = o.lam * sigmoid(rejected - chosen)
            loss = o.lam * nls(chosen - rejected) - aw
            return loss, per(1 + d * slope_w, nw), per(d * slope_l, nl)
        case "simper":
            (chosen, d_w), (rejected, d_l) = exponential(aw), exponential(al)
            return rejected - chosen, per(d_w, nw), per(d_l, nl)
        case "stapo" | "stapo_ref":
            z = aw - al if o.name == "stapo" else zw - rw - zl + rl
            nw, nl = (nw, nl) if o.name == "stapo" else (1, 1)
            left, right = (o.beta * (z - c) for c in (o.left_margin, o.right_margin))
            d = o.beta * (sigmoid(-left) - sigmoid(right))
            return nls(left) + nls(-right), per(d, nw), per(d, nl)
        case "sft":
            nw, nl = (nw, nl) if o.average else (1, 1)
            if o.responses == "chosen":
                return -per(zw, nw), per(1, nw), 0.0
            return -(per(zw, nw) + per(zl, nl)) / 2, per(0.5, nw), -per(0.5, nl)


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


@pytest.mark.parametrize(
    "objective",
    [
        IPOAvg(),
        DPONorm(),
        SimPO(),
        RRHF(lam=0),
        CPOSimPO(),
        ORPO(),
        SimPER(),
        StaPO(),
        SFT(responses="both"),
    ],
    ids=repr,
)
def test_an_empty_response_has_no_gradient_under_length_normalization(objective):
    reference = pairs_of(0, 0)
    for soft in (None, 0.3):
        d_w, d_l = losses.incentives(objective, pairs_of(0, -3, nw=0, nl=2, p=soft), reference)
        assert d_w.item() == 0
        if soft or objective != RRHF(lam=0):  # its hinge is content: aw = 0 is above al
            assert d_l.item() != 0
        d_w, d_l = losses.incentives(objective, pairs_of(-3, 0, nw=2, nl=0, p=soft), reference)
        assert d_w.item() != 0 and d_l.item() == 0


@hard_and_soft
def test_logpi_dpo_is_three_others_without_what_they_add(soft):
    policy, _ = batch(soft=soft)
    zero = dataclasses.replace(policy, chosen=0 * policy.chosen, rejected=0 * policy.rejected)
    ours = outputs(LogPiDPO(beta=0.3), policy)
    for other in (DPO(beta=0.3), PMO(alpha=0.3, beta=0), CPO(beta=0.3, lam=0)):
        assert_close(ours, outputs(other, policy, zero), 1e-12)


def test_logpi_dpo_learns_the_ratio_of_the_distributions_of_the_pairs():
    """At log P - log Q the expected gradient over all pairs of P and Q is zero, and not beside."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, generator=g, dtype=torch.float64).softmax(1)
    one = torch.ones(49)

    def pull(logps):
        every = SequenceLogps(logps.repeat_interleave(7), logps.repeat(7), one, one)
        d_w, d_l = losses.incentives(LogPiDPO(beta=1.0), every)
        both = torch.outer(p, q)
        return (both * d_w.view(7, 7)).sum(1) - (both * d_l.view(7, 7)).sum(0)

    assert pull(p.log() - q.log()).abs().max() < 1e-15
    assert pull(p.log()).abs().max() > 1e-3


@hard_and_soft
def test_ipo_avg_and_dpo_norm_are_ipo_and_dpo_of_mean_logps(soft):
    policy, reference = batch(soft=soft)
    for ours, theirs in ((IPOAvg(tau=0.3), IPO(tau=0.3)), (DPONorm(beta=0.3), DPO(beta=0.3))):
        expected = theirs(averaged(policy), averaged(reference)).loss
        assert_close(ours(policy, reference).loss, expected, 1e-12)


@hard_and_soft
def test_cpo_simpo_adds_likelihood_to_simpo(soft):
    policy, _ = batch(soft=soft)
    simpo = SimPO(beta=2.0, gamma=0.7)
    alone = outputs(CPOSimPO(beta=2.0, gamma=0.7, lam=0), policy)
    assert torch.equal(alone, outputs(simpo, policy))
    both = outputs(CPOSimPO(beta=2.0, gamma=0.7, lam=0.3), policy)
    assert_close(both, alone + 0.3 * outputs(SFT(), policy), 1e-12)


def test_orpo_without_odds_is_sft():
    policy, _ = batch(soft=True)
    assert_close(outputs(ORPO(lam=0), policy), outputs(SFT(), policy), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_a_certain_response_are_capped(dtype):
    """1 / (1 - e^a), about 1e6 from a = -1e-6 on, while ever surer rejected responses cost more."""
    al = (-1e-3, -1e-6, -1e-7, 0.0)
    at = [pairs_of(-1.0, a, dtype=dtype) for a in al]
    d_l = [losses.incentives(ORPO(lam=1.0), policy)[1].item() for policy in at]
    assert d_l == pytest.approx([1e3, 1e6, 1e6, 1e6], rel=1e-3)
    loss = [ORPO(lam=1.0)(policy).loss.item() for policy in at]
    assert loss == sorted(loss) and len(set(loss)) == 4


def test_rrhf_and_slic_hf_keep_only_likelihood_once_ordered():
    ordered = pairs_of(-5, -20, nw=5, nl=5)
    assert outputs(RRHF(lam=0.3), ordered)[0].tolist() == pytest.approx([1.5, 0.3, 0])
    assert outputs(SLiCHF(delta=2, lam=0.3), ordered)[0].tolist() == pytest.approx([1.5, 0.3, 0])
    reversed_pair = ordered.swapped()
    assert outputs(RRHF(lam=0), reversed_pair)[0].tolist() == pytest.approx([3, 0.2, 0.2])
    assert outputs(SLiCHF(delta=2, lam=0), reversed_pair)[0].tolist() == pytest.approx([17, 1, 1])


@hard_and_soft
def test_rrhf_of_sums_is_slic_hf_without_its_margin_and_rrhf_of_means_is_not(soft):
    policy, _ = batch(soft=soft)
    theirs = SLiCHF(delta=0, lam=0.3)
    assert torch.equal(outputs(RRHF(lam=0.3, average=False), policy), outputs(theirs, policy))
    assert not torch.allclose(outputs(RRHF(lam=0.3), policy), outputs(theirs, policy))
    of_means = outputs(RRHF(lam=0), policy)[:, 0]
    assert torch.equal(of_means, SLiCHF(delta=0, lam=0)(averaged(policy)).loss)


def test_sums_and_means_rank_a_long_good_response_differently():
    """Means of -1 and -2 nats in sums of -30 and -10: only the sums are in the wrong order."""
    pair = pairs_of(-30, -10, nw=30, nl=5)
    assert outputs(RRHF(lam=0), pair)[0].tolist() == [0, 0, 0]
    assert outputs(RRHF(lam=0, average=False), pair)[0].tolist() == [20, 1, 1]


def test_sft_on_both_responses_does_not_look_at_the_label():
    hard, soft = batch()[0], batch(soft=True)[0]
    objective = SFT(responses="both")
    torch.testing.assert_close(objective(hard).loss, objective(soft).loss, rtol=1e-14, atol=0)


def test_stapo_with_equal_margins_is_twice_the_cross_entropy_with_label_one_half():
    policy, reference = batch()
    chosen, rejected = means(policy)
    log_ratios = policy.chosen - reference.chosen - policy.rejected + reference.rejected
    for make, margin in ((StaPO, chosen - rejected), (StaPORef, log_ratios)):
        logits = 2.0 * (margin - 0.4)
        half = torch.full_like(logits, 0.5)
        expected = 2 * binary_cross_entropy_with_logits(logits, half, reduction="none")
        objective = make(beta=2.0, left_margin=0.4, right_margin=0.4)
        assert_close(objective(policy, reference).loss, expected, 1e-12)


@pytest.mark.parametrize("make", [StaPO, StaPORef])
def test_stapo_rests_between_its_margins(make):
    objective = make(left_margin=0.6, right_margin=0.8)
    n = 3 if make is StaPO else 1  # nats of the response for one of Z
    left, middle, right = (
        losses.incentives(objective, pairs_of(n * z, 0, nw=3), pairs_of(0, 0))[0].item()
        for z in (0.6, 0.7, 0.8)
    )
    assert left > 0 > right and abs(middle) < 1e-12


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        (LogPiDPO(beta=0.3), lambda z, r, n: 0.3 * z),
        (IPOAvg(tau=0.3), lambda z, r, n: 0.3 * (z - r) / n),
        (DPONorm(beta=0.3), lambda z, r, n: 0.3 * (z - r) / n),
        (SimPO(beta=2.5), lambda z, r, n: 2.5 * z / n),
        (SLiCHF(), lambda z, r, n: z),
        (RRHF(), lambda z, r, n: z / n),
        (RRHF(average=False), lambda z, r, n: z),
        (CPO(beta=0.3), lambda z, r, n: 0.3 * z),
        (CPOSimPO(beta=2.5), lambda z, r, n: 2.5 * z / n),
        (ORPO(), lambda z, r, n: z / n),
        (SimPER(), lambda z, r, n: z / n),
        (StaPO(beta=2.5), lambda z, r, n: 2.5 * z / n),
        (StaPORef(beta=2.5), lambda z, r, n: 2.5 * (z - r)),
        (SFT(), lambda z, r, n: z / n),
        (SFT(average=False), lambda z, r, n: z),
    ],
    ids=lambda x: repr(x) if isinstance(x, losses.Loss) else "",
)
def test_rewards(objective, reward):
    policy, reference = batch()
    out = objective(policy, reference)
    for side in ("chosen", "rejected"):
        z, r, n = (getattr(policy, side), getattr(reference, side), side + "_lengths")
        expected = reward(z, r, getattr(policy, n))
        assert_close(getattr(out, f"{side}_rewards"), expected, 1e-12)


def liger(name, function):
    reason = "liger-kernel is not installed"
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss", reason=reason)
    return getattr(module, function).preference_loss_fn


TARGET = torch.empty(64, 1)  # liger-kernel reads the number of sequences off its first dimension


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_cpo_agrees_with_liger(e):
    policy, _ = batch()
    theirs = liger("cpo", "LigerFusedLinearCPOFunction")(
        policy.chosen, policy.rejected, TARGET, beta=0.3, label_smoothing=e
    )
    # The likelihood term is added elsewhere there, so lam = 0 here.
    assert_agrees(CPO(beta=0.3, lam=0)(with_label(policy, 1 - e)), *theirs)


def test_simpo_agrees_with_liger():
    policy, _ = batch()
    theirs = liger("simpo", "LigerFusedLinearSimPOFunction")(
        *means(policy), TARGET, beta=2.0, gamma=0.7
    )
    assert_agrees(SimPO(beta=2.0, gamma=0.7)(policy), *theirs)


def test_orpo_agrees_with_liger():
    policy, _ = batch()
    loss, *_ = liger("orpo", "LigerFusedLinearORPOFunction")(*means(policy), TARGET, beta=0.3)
    # The likelihood term is added elsewhere there; its rewards are scaled by lam.
    odds = ORPO(lam=0.3)(policy).loss - SFT()(policy).loss
    assert_close(odds.mean(), loss, 1e-12)


@pytest.mark.filterwarnings("ignore")  # TRL announces that its CPO trainer is experimental
def test_simpo_and_cpo_agree_with_trl():
    """Its loss reads five attributes of the trainer, so a namespace stands in for one.

    TRL's DPO loss cannot be reached without building a trainer.
    """
    trl = pytest.importorskip("trl.experimental.cpo", reason="trl is not installed")
    policy, _ = batch()

    def theirs(chosen, rejected, **attributes):
        trainer = SimpleNamespace(
            alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"), **attributes
        )
        return trl.CPOTrainer.cpo_loss(trainer, chosen, rejected)

    loss, *rewards = theirs(policy.chosen, policy.rejected, loss_type="sigmoid", beta=0.3)
    assert_agrees(CPO(beta=0.3, lam=0)(policy), loss.mean(), *rewards)
    loss, *rewards = theirs(*means(policy), loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    assert_agrees(SimPO(beta=2.0, gamma=0.7)(policy), loss.mean(), *rewards)
