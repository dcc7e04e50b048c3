"""Objectives of reward models, against literal numbers and sums over all orders."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastpref import losses
from fastpref.fused import FusedPreferenceLoss
from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps
from fastpref.losses import base, pointwise
from fastpref.losses.groupwise import groupwise_incentives


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(chosen: Tensor, rejected: Tensor, **columns: Tensor) -> SequenceLogps:
    ones = torch.ones(len(chosen), dtype=torch.int64)
    return SequenceLogps(chosen, rejected, ones, ones, **columns)


def groups(rewards: Tensor, scores: Tensor, *offsets: int) -> GroupedLogps:
    return GroupedLogps(rewards, torch.ones_like(rewards).long(), torch.tensor(offsets), scores)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_with_margin_centering_and_soft_label() -> None:
    policy = pairs(
        doubles(2.0, 0.5), doubles(1.0, 1.5), preference=doubles(1.0, 0.8), margin=doubles(0.5, 2.0)
    )
    loss = losses.build("bradley_terry", center_rewards_coefficient=0.1, offset=2.0)
    first = softplus(-(1.0 - 2.0 * 0.5)) + 0.1 * 9.0
    # The reversed pair has the difference 1 and the margin -2.
    second = 0.8 * softplus(1.0 + 4.0) + 0.2 * softplus(-(1.0 + 4.0)) + 0.1 * 4.0
    output = loss(policy)
    torch.testing.assert_close(output.loss, doubles(first, second), rtol=1e-14, atol=0)
    assert output.chosen_rewards.tolist() == [2.0, 0.5]
    plain = losses.build("bradley_terry")(dataclasses.replace(policy, preference=None))
    torch.testing.assert_close(plain.loss, doubles(softplus(-1.0), softplus(1.0)))
    d_w, d_l = base.incentives(losses.build("bradley_terry"), pairs(doubles(2.0), doubles(1.0)))
    assert d_w.item() == d_l.item() == pytest.approx(1 / (1 + math.e))


def test_a_margin_that_is_asked_for_must_be_there() -> None:
    loss = losses.build("bradley_terry", offset=1.0)
    assert loss.needs_margin and not losses.build("bradley_terry").needs_margin
    with pytest.raises(ValueError, match="margin: bradley_terry needs the margin of each pair"):
        loss(pairs(doubles(1.0), doubles(0.0)))


def test_plackett_luce_is_the_likelihood_of_the_order() -> None:
    rewards, scores = doubles(0.3, -1.0, 2.0, 0.7, 0.1), doubles(5, 9, 1, 2, 1)
    output = losses.build("plackett_luce")(groups(rewards, scores, 0, 3, 5))

    def probability(order: list[int]) -> float:
        rest, product = list(order), 1.0
        while rest:
            weights = [math.exp(rewards[k]) for k in rest]
            product *= weights[0] / sum(weights)
            rest.pop(0)
        return product

    expected = doubles(-math.log(probability([1, 0, 2])), -math.log(probability([3, 4])))
    torch.testing.assert_close(output.loss, expected, rtol=1e-14, atol=0)
    everything = sum(probability(list(order)) for order in itertools.permutations(range(3)))
    assert everything == pytest.approx(1.0)
    torch.testing.assert_close(output.rewards, rewards)


def test_plackett_luce_of_two_responses_is_bradley_terry_and_pulls_ties_together() -> None:
    options = {"center_rewards_coefficient": 0.3}
    pair = pairs(doubles(0.4), doubles(-1.1))
    expected = losses.build("bradley_terry", **options)(pair).loss
    two = groups(doubles(-1.1, 0.4), doubles(0.0, 3.0), 0, 2)
    torch.testing.assert_close(losses.build("plackett_luce", **options)(two).loss, expected)
    tied = groups(doubles(1.0, -1.0), doubles(7, 7), 0, 2)
    d = groupwise_incentives(losses.build("plackett_luce"), tied)
    assert d[0] < 0 < d[1] and d.sum().abs() < 1e-15


def test_regression_of_scores_and_labels() -> None:
    rewards, scores = doubles(1.0, 4.0, -1.0), doubles(0.0, 2.0, 1.0)
    output = losses.build("reward_regression")(groups(rewards, scores, 0, 2, 3))
    assert output.loss.tolist() == [2.5, 4.0]
    labels = torch.tensor([True, False])
    policy = UnpairedLogps(doubles(0.25, 0.5), torch.tensor([3, 1]), labels)
    single = losses.build("label_regression")(policy)
    assert single.loss.tolist() == [0.5625, 0.25] and not single.classifies
    d = pointwise.pointwise_incentives(losses.build("label_regression"), policy)
    assert d.tolist() == [1.5, -1.0]


@pytest.mark.parametrize("name", losses.reward_names())
def test_a_reward_objective_says_what_it_is_and_stands_apart(name: str) -> None:
    about = losses.describe(name)
    assert name not in losses.names() and not about.needs_reference
    assert all((about.summary, about.formula, about.incentives, about.source, about.use))
    assert losses.config_of(losses.build(name)) == {"name": name, **about.defaults}
    with pytest.raises(ValueError, match=f"wpo: not a parameter of {name}, which accepts "):
        losses.build(name, wpo=True)
    with pytest.raises(ValueError, match=f"{name} is an objective of reward models, which have re"):
        FusedPreferenceLoss(name)
    message = rf"loss\[1\].name: {name} is an objective of reward models, which are not added up"
    with pytest.raises(ValueError, match=message):
        losses.from_config([{"name": "dpo"}, {"name": name}])
