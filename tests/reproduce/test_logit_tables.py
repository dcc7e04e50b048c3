"""Tables of logits, trained side by side."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref.reproduce.logit_tables import Pairs, all_pairs, always, draw, entropy, js, train


def test_divergences_are_those_of_probabilities() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    m = (p + q) / 2
    expected = sum(torch.xlogy(x, x / m).sum() for x in (p, q)) / 2
    smooth = [(x + 1e-12).log().log_softmax(0) for x in (p, q)]
    assert js(*smooth) == pytest.approx(expected.item(), abs=1e-6)
    double = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    assert js(double, double) == pytest.approx(0, abs=1e-15)
    assert js(double, double.flip(0)) == pytest.approx(0.25310161544280674, abs=1e-15)
    assert js(torch.stack([double, double]), double).shape == (2,)


def test_the_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size() -> None:
    assert entropy(torch.zeros(2, 8).log_softmax(1)).tolist() == pytest.approx([math.log(8)] * 2)


def test_every_ordered_pair_occurs_once() -> None:
    chosen, rejected = all_pairs(3, 2)
    assert chosen.shape == rejected.shape == (2, 9)
    assert sorted(zip(chosen[1].tolist(), rejected[1].tolist(), strict=True)) == [
        (a, b) for a in range(3) for b in range(3)
    ]


def test_tables_learn_their_own_rewards_and_not_those_of_others() -> None:
    """The optimum of β log π on soft labels is the softmax of the rewards, in each table."""
    generator = torch.Generator().manual_seed(0)
    start, rewards = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    chosen, rejected = all_pairs(5, 3)
    preference = torch.sigmoid(rewards.gather(1, chosen) - rewards.gather(1, rejected))
    pairs = always(Pairs(chosen, rejected, preference=preference))
    loss = {"name": "logpi_dpo", "beta": 1.0}
    together = train(start.log_softmax(1), loss, pairs, 800, 0.05)
    torch.testing.assert_close(together.exp(), rewards.softmax(1), rtol=0, atol=1e-6)
    alone = always(Pairs(chosen[:1], rejected[:1], preference=preference[:1]))
    first = train(start[:1].log_softmax(1), loss, alone, 20, 0.05)
    again = train(start.log_softmax(1), loss, pairs, 20, 0.05)[:1]
    torch.testing.assert_close(first, again, rtol=0, atol=1e-12)


def test_weights_are_those_of_a_population() -> None:
    """A pair with all the weight is the only one that is trained on."""
    start = torch.zeros(1, 3, dtype=torch.float64).log_softmax(1)
    chosen, rejected = all_pairs(3, 1)
    weights = ((chosen == 2) & (rejected == 0)).double()
    policy = train(start, {"name": "dpo"}, always(Pairs(chosen, rejected, weights)), 10, 0.1)
    assert policy[0, 2] > policy[0, 1] > policy[0, 0]


def test_responses_are_drawn_by_their_probabilities() -> None:
    logps = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]).log()
    drawn = draw(logps, 5000, torch.Generator().manual_seed(0))
    assert drawn[0].bincount(minlength=3) / 5000 == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    assert drawn[1].unique().tolist() == [2]
