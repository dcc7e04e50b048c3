"""Every pairwise objective against closed forms, differences, limits, and other libraries."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from fastpref import losses
from fastpref.logps import SequenceLogps
from fastpref.losses import CDPO, CPO, DPO, IPO, PMO, SFT, SimPO, StaPO

OBJECTIVES = [
    SFT(),
    SFT(average=False),
    SFT(responses="both"),
    SFT(responses="both", average=False),
    DPO(),
    CDPO(beta=0.3, label_smoothing=0.05),
    IPO(),
    IPO(tau=0.02),
    SimPO(),
    SimPO(beta=10.0, gamma=-3.0),
    CPO(),
    CPO(beta=0.4, lam=0.0),
    PMO(),
    PMO(alpha=0.05, beta=0.05),
    PMO(alpha=0.5, beta=0.0),
    StaPO(),
    StaPO(beta=0.7, left_margin=-1.0, right_margin=2.5),
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def sigmoid(x):
    return 0.5 * (1 + math.tanh(x / 2))


def nls(x):
    """-log sigmoid(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def per(x, n):
    return x / n if n else 0.0


def closed_form(o, zw, zl, rw, rl, nw, nl):
    """Loss, d_w and d_l of one hard-label pair, written in plain floats from the derivatives."""
    mean_margin, log_ratio_margin = per(zw, nw) - per(zl, nl), zw - zl - rw + rl
    match o:
        case SFT():
            nw, nl = (nw, nl) if o.average else (1, 1)
            if o.responses == "chosen":
                return -per(zw, nw), per(1, nw), 0.0
            return -(per(zw, nw) + per(zl, nl)) / 2, per(0.5, nw), -per(0.5, nl)
        case DPO():
            u = o.beta * log_ratio_margin
            return nls(u), o.beta * sigmoid(-u), o.beta * sigmoid(-u)
        case CDPO():
            u, e = o.beta * log_ratio_margin, o.label_smoothing
            d = o.beta * (1 - e - sigmoid(u))
            return (1 - e) * nls(u) + e * nls(-u), d, d
        case IPO():
            gap = 1 / (2 * o.tau) - log_ratio_margin
            return gap**2, 2 * gap, 2 * gap
        case SimPO():
            v = o.beta * mean_margin - o.gamma
            d = o.beta * sigmoid(-v)
            return nls(v), per(d, nw), per(d, nl)
        case CPO():
            d = o.beta * sigmoid(-o.beta * (zw - zl))
            return nls(o.beta * (zw - zl)) - o.lam * zw, d + o.lam, d
        case PMO():
            v = (o.alpha + o.beta) * (zw - zl) - o.beta * (rw - rl)
            d = (o.alpha + o.beta) * sigmoid(-v)
            return nls(v), d, d
        case StaPO():
            left, right = (o.beta * (mean_margin - c) for c in (o.left_margin, o.right_margin))
            d = o.beta * (sigmoid(-left) - sigmoid(right))
            return nls(left) + nls(-right), per(d, nw), per(d, nl)


def soft_closed_form(o, p, zw, zl, rw, rl, nw, nl):
    """Both orders of the pair, weighed by p and 1 - p."""
    loss, d_w, d_l = closed_form(o, zw, zl, rw, rl, nw, nl)
    swapped_loss, swapped_w, swapped_l = closed_form(o, zl, zw, rl, rw, nl, nw)
    q = 1 - p
    return p * loss + q * swapped_loss, p * d_w - q * swapped_l, p * d_l - q * swapped_w


def batch(pairs=32, seed=0, soft=False):
    """Random policy and reference in fp64: z around -50 nats, log-ratios of a few nats."""
    g = torch.Generator().manual_seed(seed)
    z = -50 + 20 * torch.randn(2 * pairs, generator=g, dtype=torch.float64)
    r = z + 5 * torch.randn(2 * pairs, generator=g, dtype=torch.float64)
    n = torch.randint(1, 40, (2 * pairs,), generator=g)
    p = torch.rand(pairs, generator=g, dtype=torch.float64) if soft else None
    return SequenceLogps.from_sequences(z, n, p), SequenceLogps.from_sequences(r, n)


def pairs_of(zw, zl, nw=1, nl=1, p=None, dtype=torch.float64):
    """One pair from numbers."""
    value = [torch.tensor([float(x)], dtype=dtype) for x in (zw, zl)]
    length = [torch.tensor([n]) for n in (nw, nl)]
    return SequenceLogps(*value, *length, None if p is None else torch.tensor([p], dtype=dtype))


def with_label(policy, p):
    """The same pairs with one soft label for all."""
    return dataclasses.replace(policy, preference=torch.full_like(policy.chosen, p))


def rows(policy, reference):
    columns = (policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    lengths = (policy.chosen_lengths, policy.rejected_lengths)
    return zip(*(column.tolist() for column in (*columns, *lengths)), strict=True)


def outputs(objective, policy, reference):
    d_w, d_l = losses.incentives(objective, policy, reference)
    return torch.stack([objective(policy, reference).loss, d_w, d_l], dim=1)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance
    )


def test_no_objective_is_left_out():
    assert {objective.name for objective in OBJECTIVES} == set(losses.names())


@every_objective
def test_loss_and_incentives_match_the_closed_form(objective):
    policy, reference = batch()
    expected = [closed_form(objective, *row) for row in rows(policy, reference)]
    # fp64 on values up to 1e4: 1e-10 leaves room for another order of the operations.
    assert_close(outputs(objective, policy, reference), expected, 1e-10)


@every_objective
def test_loss_and_incentives_match_the_closed_form_with_soft_labels(objective):
    policy, reference = batch(soft=True)
    labelled = zip(policy.preference.tolist(), rows(policy, reference), strict=True)
    expected = [soft_closed_form(objective, p, *row) for p, row in labelled]
    assert_close(outputs(objective, policy, reference), expected, 1e-10)


@every_objective
@hard_and_soft
def test_incentives_match_central_differences(objective, soft):
    policy, reference = batch(soft=soft)
    # Truncation, h^2/6 times a third derivative of up to 100, is 2e-7; rounding is below 1e-8.
    h = 1e-4

    def slope(side):
        up, down = (
            dataclasses.replace(policy, **{side: getattr(policy, side) + step}) for step in (h, -h)
        )
        return (objective(up, reference).loss - objective(down, reference).loss) / (2 * h)

    d_w, d_l = losses.incentives(objective, policy, reference)
    assert_close(-slope("chosen"), d_w, 1e-6)
    assert_close(slope("rejected"), d_l, 1e-6)


@every_objective
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-10)],  # fp32: eight units in the last place
    ids=["fp32", "fp64"],
)
def test_extreme_ratios_and_lengths_match_the_closed_form(objective, dtype, tolerance):
    # 32768 tokens is a long context; an empty response has log-prob 0. Integers below 2^17 are
    # exact in fp32, so both precisions see the same inputs.
    responses = [(-65536 + ratio, -65536, n) for ratio in (-1e4, 0, 1e4) for n in (1, 32768)]
    responses.append((0, 0, 0))
    grid = torch.tensor([a + b for a in responses for b in responses], dtype=dtype)
    zw, rw, nw, zl, rl, nl = grid.unbind(1)
    policy, reference = SequenceLogps(zw, zl, nw, nl), SequenceLogps(rw, rl, nw, nl)
    expected = [closed_form(objective, *row) for row in rows(policy, reference)]
    assert_close(outputs(objective, policy, reference), expected, tolerance)


@pytest.mark.parametrize("objective", [SFT(responses="both"), SimPO(), StaPO()], ids=repr)
def test_an_empty_response_has_no_gradient_under_length_normalisation(objective):
    for soft in (None, 0.3):
        d_w, d_l = losses.incentives(objective, pairs_of(0, -3, nw=0, nl=2, p=soft))
        assert d_w.item() == 0 and d_l.item() != 0
        d_w, d_l = losses.incentives(objective, pairs_of(-3, 0, nw=2, nl=0, p=soft))
        assert d_w.item() != 0 and d_l.item() == 0


LOG_RATIO = st.floats(-1e4, 1e4, width=32)
LOGP = st.floats(-1e5, 0, width=32)
LENGTH = st.sampled_from([0, 1, 2, 37, 32768])
RESPONSE = st.tuples(LOGP, LOG_RATIO, LENGTH)


@settings(max_examples=300, deadline=None)
@given(
    objective=st.sampled_from(OBJECTIVES),
    chosen=RESPONSE,
    rejected=RESPONSE,
    p=st.none() | st.floats(0, 1, width=32),
)
def test_loss_rewards_and_gradients_are_finite_in_fp32(objective, chosen, rejected, p):
    (rw, tw, nw), (rl, tl, nl) = chosen, rejected
    policy = pairs_of(rw + tw, rl + tl, nw, nl, p, dtype=torch.float32)
    reference = pairs_of(rw, rl, nw, nl, dtype=torch.float32)
    out = objective(policy, reference)
    for tensor in (*dataclasses.astuple(out), *losses.incentives(objective, policy, reference)):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("p", [0.03, 0.5, 0.8])
@pytest.mark.parametrize(
    ("objective", "optimum"),  # optimum: p -> the margin tw - tl at which nothing pulls
    [
        (DPO(beta=0.3), lambda p: logit(p) / 0.3),
        (CDPO(beta=0.3, label_smoothing=0.1), lambda p: logit(0.9 * p + 0.1 * (1 - p)) / 0.3),
        (IPO(tau=0.2), lambda p: (p - 0.5) / 0.2),
        (PMO(alpha=0.2, beta=0.1), lambda p: logit(p) / 0.3),
    ],
    ids=["dpo", "cdpo", "ipo", "pmo"],
)
def test_a_soft_label_moves_the_optimum(objective, optimum, p):
    reference = pairs_of(0, 0)
    at = [pairs_of(optimum(p) + step, 0, p=p) for step in (0.0, -0.1, 0.1)]
    d_w, d_l = losses.incentives(objective, at[0], reference)
    assert abs(d_w.item()) < 1e-12 and abs(d_l.item()) < 1e-12
    here, below, above = (objective(policy, reference).loss.item() for policy in at)
    assert here < below and here < above


def test_sft_on_both_responses_does_not_look_at_the_label():
    hard, soft = batch()[0], batch(soft=True)[0]
    objective = SFT(responses="both")
    torch.testing.assert_close(objective(hard).loss, objective(soft).loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft_label", [None, 0.3])
def test_cdpo_without_smoothing_is_dpo(soft_label):
    policy, reference = batch()
    if soft_label is not None:
        policy = with_label(policy, soft_label)
    cdpo = outputs(CDPO(beta=0.3, label_smoothing=0), policy, reference)
    assert_close(cdpo, outputs(DPO(beta=0.3), policy, reference), 1e-12)


def test_cdpo_is_dpo_with_a_constant_soft_label():
    policy, reference = batch()
    cdpo = outputs(CDPO(beta=0.3, label_smoothing=0.15), policy, reference)
    assert_close(cdpo, outputs(DPO(beta=0.3), with_label(policy, 0.85), reference), 1e-12)


@hard_and_soft
def test_pmo_without_entropy_is_dpo(soft):
    policy, reference = batch(soft=soft)
    pmo = outputs(PMO(alpha=0, beta=0.3), policy, reference)
    assert torch.equal(pmo, outputs(DPO(beta=0.3), policy, reference))


def test_stapo_with_equal_margins_is_twice_the_cross_entropy_with_label_one_half():
    policy, _ = batch()
    mean_margin = policy.chosen / policy.chosen_lengths - policy.rejected / policy.rejected_lengths
    logits = 2.0 * (mean_margin - 0.4)
    half = torch.full_like(logits, 0.5)
    expected = 2 * binary_cross_entropy_with_logits(logits, half, reduction="none")
    assert_close(StaPO(beta=2.0, left_margin=0.4, right_margin=0.4)(policy).loss, expected, 1e-12)


def test_stapo_rests_between_its_margins():
    objective = StaPO(left_margin=0.6, right_margin=0.8)
    left, middle, right = (
        losses.incentives(objective, pairs_of(3 * z, 0, nw=3))[0].item() for z in (0.6, 0.7, 0.8)
    )
    assert left > 0 > right and abs(middle) < 1e-12


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        (SFT(), lambda z, r, n: z / n),
        (SFT(average=False), lambda z, r, n: z),
        (DPO(beta=0.3), lambda z, r, n: 0.3 * (z - r)),
        (CDPO(beta=0.3), lambda z, r, n: 0.3 * (z - r)),
        (IPO(tau=0.3), lambda z, r, n: 0.3 * (z - r)),
        (SimPO(beta=2.5), lambda z, r, n: 2.5 * z / n),
        (CPO(beta=0.3), lambda z, r, n: 0.3 * z),
        (PMO(alpha=0.5, beta=0.1), lambda z, r, n: 0.6 * z - 0.1 * r),
        (StaPO(beta=2.5), lambda z, r, n: 2.5 * z / n),
    ],
    ids=lambda x: repr(x) if dataclasses.is_dataclass(x) else "",
)
def test_rewards(objective, reward):
    policy, reference = batch()
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    out = objective(policy, reference)
    assert out.loss.requires_grad
    for side in ("chosen", "rejected"):
        actual = getattr(out, f"{side}_rewards")
        z, r = getattr(policy, side).detach(), getattr(reference, side)
        assert not actual.requires_grad
        expected = reward(z, r, getattr(policy, f"{side}_lengths"))
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("objective", [DPO(), CDPO(), IPO(), PMO(alpha=0, beta=0.1)], ids=repr)
def test_rewards_are_exactly_zero_before_the_first_step(objective):
    policy, _ = batch()
    out = objective(policy, policy)
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()


def assert_agrees(out, loss, chosen_rewards, rejected_rewards):
    assert_close(out.loss.mean(), loss, 1e-12)
    assert_close(out.chosen_rewards, chosen_rewards, 1e-12)
    assert_close(out.rejected_rewards, rejected_rewards, 1e-12)


def liger(name, function):
    reason = "liger-kernel is not installed"
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss", reason=reason)
    return getattr(module, function).preference_loss_fn


TARGET = torch.empty(64, 1)  # liger-kernel reads the number of sequences off its first dimension


def test_dpo_agrees_with_liger():
    policy, reference = batch()
    theirs = liger("dpo", "LigerFusedLinearDPOFunction")(
        policy.chosen, policy.rejected, TARGET, reference.chosen, reference.rejected, beta=0.3
    )
    assert_agrees(DPO(beta=0.3)(policy, reference), *theirs)


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
    means = policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths
    theirs = liger("simpo", "LigerFusedLinearSimPOFunction")(*means, TARGET, beta=2.0, gamma=0.7)
    assert_agrees(SimPO(beta=2.0, gamma=0.7)(policy), *theirs)


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
    loss, *rewards = theirs(
        policy.chosen / policy.chosen_lengths,
        policy.rejected / policy.rejected_lengths,
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=0.7,
    )
    assert_agrees(SimPO(beta=2.0, gamma=0.7)(policy), loss.mean(), *rewards)
