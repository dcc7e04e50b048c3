"""Objectives of whole batches against closed forms that sort and average in plain Python."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from fastpref.logps import SequenceLogps
from fastpref.losses.batchwise import AOT, OBJECTIVES, AOTUnpaired, BetaDPO
from fastpref.losses.margin import CDPO, DPO
from tests.helpers.pairs import (
    assert_close,
    assert_finite,
    batch,
    nls,
    outputs,
    pairs_of,
    rows,
    sigmoid,
)

CASES = [
    BetaDPO(),
    BetaDPO(beta=0.3, alpha=0.05),
    AOT(),
    AOT(beta=0.3, label_smoothing=0.2),
    AOTUnpaired(),
    AOTUnpaired(beta=0.3, label_smoothing=0.2),
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)


def same_rank(values, like):
    """For each of `like`, the one of `values` that has its rank, and where that one stands."""
    places = sorted(range(len(like)), key=like.__getitem__)
    order = sorted(range(len(values)), key=values.__getitem__)
    source = dict(zip(places, order, strict=True))
    return [source[i] for i in range(len(like))]


def closed_form(o, policy, reference):
    """Loss, d_w and d_l of every pair."""
    columns = list(zip(*rows(policy, reference), strict=True))
    zw, zl, rw, rl = columns[:4]
    tw = [z - r for z, r in zip(zw, rw, strict=True)]
    tl = [z - r for z, r in zip(zl, rl, strict=True)]
    if o.name == "beta_dpo":
        margins = [w - l for w, l in zip(tw, tl, strict=True)]  # noqa: E741
        mean = statistics.fmean(margins)
        betas = [max(1e-3, o.beta * (1 + o.alpha * (m - mean))) for m in margins]
        each = zip(betas, margins, strict=True)
        return [(nls(b * m), b * sigmoid(-b * m), b * sigmoid(-b * m)) for b, m in each]
    if o.name == "aot":
        ours = [a - b for a, b in zip(zw, zl, strict=True)]
        theirs = [a - b for a, b in zip(rw, rl, strict=True)]
        source = list(range(len(zw)))  # d_l belongs to the pair itself
        gaps = [m - theirs[j] for m, j in zip(ours, same_rank(theirs, ours), strict=True)]
    else:
        source = same_rank(tl, tw)
        gaps = [w - tl[j] for w, j in zip(tw, source, strict=True)]
    e, table = o.label_smoothing, [[0.0, 0.0, 0.0] for _ in zw]
    for i, gap in enumerate(gaps):
        u = o.beta * gap
        d = o.beta * (1 - e - sigmoid(u))
        table[i][0], table[i][1] = (1 - e) * nls(u) + e * nls(-u), d
        table[source[i]][2] = d
    return table


def test_no_objective_is_left_out():
    assert {type(objective) for objective in CASES} == set(OBJECTIVES)


@every_case
@pytest.mark.parametrize("pairs", [1, 2, 33])
def test_loss_and_incentives_match_the_closed_form(objective, pairs):
    policy, reference = batch(pairs)
    expected = closed_form(objective, policy, reference)
    assert_close(outputs(objective, policy, reference), expected, 1e-10)


@every_case
def test_everything_is_finite(objective):
    assert_finite(objective)


@every_case
def test_soft_labels_are_refused_by_name(objective):
    policy, reference = batch(soft=True)
    message = rf"preference: {objective.name} does not take soft labels; .*soft_labels: false"
    with pytest.raises(ValueError, match=message):
        objective(policy, reference)


@every_case
def test_the_order_of_the_pairs_does_not_matter(objective):
    policy, reference = batch()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    shuffled = [
        SequenceLogps(*(getattr(part, field.name)[order] for field in dataclasses.fields(part)[:4]))
        for part in (policy, reference)
    ]
    expected = outputs(objective, policy, reference)[order]
    torch.testing.assert_close(outputs(objective, *shuffled), expected, rtol=1e-12, atol=1e-12)


def test_aot_of_a_single_pair_is_cdpo():
    policy, reference = batch(1)
    expected = outputs(CDPO(beta=0.3, label_smoothing=0.2), policy, reference)
    for make in (AOT, AOTUnpaired):
        ours = outputs(make(beta=0.3, label_smoothing=0.2), policy, reference)
        assert_close(ours, expected, 1e-12)


def test_aot_gives_equal_margins_one_rank_each():
    """Ties, as in a batch of repeated pairs: every reference margin is used once."""
    policy = dataclasses.replace(pairs_of(0, 0), chosen=torch.zeros(4), rejected=torch.zeros(4))
    reference = dataclasses.replace(policy, chosen=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    out = AOT(beta=1.0)(policy, reference)
    expected = [nls(-r) for r in (1, 2, 3, 4)]
    torch.testing.assert_close(out.loss.sort().values, torch.tensor(expected))


def test_beta_dpo_with_alpha_zero_is_dpo():
    policy, reference = batch()
    ours = outputs(BetaDPO(beta=0.3, alpha=0), policy, reference)
    assert_close(ours, outputs(DPO(beta=0.3), policy, reference), 1e-12)


def test_beta_dpo_never_goes_below_a_thousandth():
    policy = dataclasses.replace(
        pairs_of(0, 0), chosen=torch.tensor([-50.0, 50.0]), rejected=torch.zeros(2)
    )
    reference = dataclasses.replace(policy, chosen=torch.zeros(2))
    out = BetaDPO(beta=0.1, alpha=0.6)(policy, reference)
    torch.testing.assert_close(out.loss[0], torch.tensor(nls(-50 * 1e-3)))


@every_case
def test_rewards(objective):
    policy, reference = batch()
    out = objective(policy, reference)
    assert_close(out.chosen_rewards, objective.beta * (policy.chosen - reference.chosen), 1e-12)
