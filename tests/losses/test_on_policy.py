"""Objectives on the policy's own samples: closed forms, and the optima they reach."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from fastpref import losses
from fastpref.logps import GroupedLogps
from fastpref.losses.groupwise import GroupwiseLoss, groupwise_incentives
from fastpref.losses.on_policy import GSPO, RLOO, NashMD
from fastpref.online import policy_gradient
from fastpref.online.rollouts import Rollouts
from fastpref.reproduce import logit_tables, online_tables
from tests.helpers.pairs import sigmoid

OFFSETS = torch.tensor([0, 3, 3, 4, 6])  # a group without responses, and one of a single response


def _groups() -> tuple[GroupedLogps, GroupedLogps]:
    generator = torch.Generator().manual_seed(0)
    z, r, scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([2, 1, 3, 1, 1, 2])
    policy, reference = (GroupedLogps(x - 5, lengths, OFFSETS, scores) for x in (z, r))
    return policy, reference


def _advantages(objective: GroupwiseLoss, t: list[float], scores: list[float]) -> list[float]:
    """N * d_i of one group, in plain floats."""
    values = []
    for i, score in enumerate(scores):
        others = [j for j in range(len(scores)) if j != i]
        if isinstance(objective, RLOO):
            rewards = [s - objective.beta * x for s, x in zip(scores, t, strict=True)]
            mean = sum(rewards[j] for j in others) / len(others) if others else rewards[i]
            values.append(rewards[i] - mean)
        else:
            wins = [sigmoid(score - scores[j]) for j in others]
            p = sum(wins) / len(wins) if wins else 0.5
            values.append(p - 0.5 - objective.beta * t[i])
    return values


def _loss(objective: GroupwiseLoss, t: list[float], scores: list[float]) -> float:
    """Loss of one group, in plain floats."""
    n, beta = len(t), objective.beta
    if isinstance(objective, RLOO):
        pairs = itertools.combinations(zip(t, scores, strict=True), 2)
        squares = [(x - y - (a - b) / beta) ** 2 for (x, a), (y, b) in pairs]
        return beta / (2 * n * max(1, n - 1)) * sum(squares) if n else 0.0
    total = 0.0
    for i, score in enumerate(scores):
        wins = [sigmoid(score - other) for j, other in enumerate(scores) if j != i]
        p = sum(wins) / len(wins) if wins else 0.5
        total += (t[i] - (p - 0.5) / beta) ** 2
    return beta / (2 * n) * total if n else 0.0


VARIANTS = (RLOO(), RLOO(beta=0.7), NashMD(), NashMD(beta=0.7))


@pytest.mark.parametrize("objective", VARIANTS, ids=repr)
def test_loss_and_incentives_match_the_closed_form(objective: GroupwiseLoss) -> None:
    policy, reference = _groups()
    t = (policy.logps - reference.logps).tolist()
    expected, sums = [], []
    for start, end in itertools.pairwise(OFFSETS.tolist()):
        group = slice(start, end)
        scores = policy.scores[group].tolist()
        expected += [a / (end - start) for a in _advantages(objective, t[group], scores)]
        sums.append(_loss(objective, t[group], scores))
    incentives = groupwise_incentives(objective, policy, reference)
    assert incentives.tolist() == pytest.approx(expected, abs=1e-14)
    output = objective(policy, reference)
    assert output.loss.tolist() == pytest.approx(sums, rel=1e-13)
    assert output.rewards.tolist() == pytest.approx([objective.beta * x for x in t], abs=1e-14)


@pytest.mark.parametrize("objective", [RLOO(), NashMD()], ids=repr)
def test_the_loss_is_0_at_the_optimum(objective: GroupwiseLoss) -> None:
    policy, reference = _groups()
    targets = policy.scores
    if isinstance(objective, NashMD):
        groups = policy.scores.tensor_split(OFFSETS[1:-1].tolist())
        wins = [(torch.sigmoid(x[:, None] - x) - 0.5).sum(1) / max(1, len(x) - 1) for x in groups]
        targets = torch.cat(wins)
    moved = dataclasses.replace(policy, logps=reference.logps + targets / objective.beta)
    assert objective(moved, reference).loss.abs().max() < 1e-25


def test_rloo_has_the_gradient_of_the_online_objective_on_the_policys_own_samples() -> None:
    """Three responses of two, one and three tokens to one prompt."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    old, reference = -1 - noise.abs()
    offsets, groups = torch.tensor([0, 2, 3, 6]), torch.tensor([0, 3])
    scores = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    online = policy_gradient.RLOO(beta=0.3)
    rollouts = online.prepare(Rollouts(offsets, old, scores, reference, cu_groups=groups))
    logps = old.clone().requires_grad_()
    (by_token,) = torch.autograd.grad(online.loss(logps, rollouts).sum() / 3, logps)
    sums = [
        GroupedLogps(rollouts.sums(x), rollouts.lengths, groups, scores) for x in (old, reference)
    ]
    incentives = groupwise_incentives(RLOO(beta=0.3), *sums)
    torch.testing.assert_close(-by_token, incentives.repeat_interleave(rollouts.lengths))


def test_gspo_in_plain_floats() -> None:
    """Ratios below, within and above the bounds, each with advantages of both signs."""
    steps, scores = [-0.3, -0.3, 0.05, -0.02, 0.3, 0.3], [1.0, -2.0, 0.5, 0.25, 3.0, -1.5]
    lengths, groups = torch.tensor([2, 1, 3, 1, 1, 2]), torch.tensor([0, 6])
    reference = GroupedLogps(
        -lengths.double(), lengths, groups, torch.tensor(scores, dtype=torch.float64)
    )
    moved = reference.logps + torch.tensor(steps, dtype=torch.float64) * lengths
    policy = dataclasses.replace(reference, logps=moved)
    advantages = [s - statistics.fmean(scores) for s in scores]
    for scale, std in (("group", statistics.stdev(scores) + 1e-4), ("none", 1.0)):
        loss = losses.build("gspo", epsilon=0.1, epsilon_high=0.2, scale_rewards=scale)
        assert isinstance(loss, GSPO)
        terms, expected = [], []
        for a, step, n in zip(advantages, steps, lengths.tolist(), strict=True):
            s = math.exp(step)
            terms.append(max(-a / std * s, -a / std * min(max(s, 0.9), 1.2)) / 6)
            clipped = s > 1.2 if a > 0 else s < 0.9
            expected.append(0.0 if clipped else a / std * s / (6 * n))
        assert loss(policy, reference).loss.item() == pytest.approx(sum(terms), rel=1e-13)
        incentives = groupwise_incentives(loss, policy, reference)
        assert incentives.tolist() == pytest.approx(expected, abs=1e-14)
        assert expected.count(0.0) == 2


def test_gspo_has_the_gradient_of_grpo_on_the_policys_own_samples() -> None:
    """A group of three, one of a single response that GRPO refuses, and one of equal scores."""
    lengths, groups = torch.tensor([2, 1, 3, 2, 1, 4]), torch.tensor([0, 3, 4, 6])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    scores = torch.tensor([0.5, -1.0, 2.0, 7.0, 1.0, 1.0], dtype=torch.float64)
    old = -torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = GroupedLogps(-torch.ones(6, dtype=torch.float64), lengths, groups, scores)
    incentives = groupwise_incentives(GSPO(), sums, sums)
    grpo = policy_gradient.GRPO(beta=0.0)
    rollouts = grpo.prepare(Rollouts(offsets[:4], old[:6], scores[:3], cu_groups=groups[:2]))
    logps = old[:6].clone().requires_grad_()
    (by_token,) = torch.autograd.grad(grpo.loss(logps, rollouts).sum() / 3, logps)
    torch.testing.assert_close(-by_token, incentives[:3].repeat_interleave(lengths[:3]))
    assert incentives[3:].tolist() == [0.0, 0.0, 0.0]


def test_gspo_takes_many_steps_on_one_set_of_samples_within_its_bounds() -> None:
    """With ratios the later steps stop where the clipping begins; the reward still grows."""
    reference, rewards = online_tables.world(3, 32)
    generator = torch.Generator().manual_seed(0)
    table = reference.clone().requires_grad_()
    loss, optimizer = GSPO(epsilon=0.2, epsilon_high=0.2), torch.optim.Adam([table], lr=0.02)
    ones, offsets = torch.ones(1024), torch.arange(0, 1025, 4)
    for _ in range(4):
        old = table.detach().log_softmax(0)
        drawn = logit_tables.draw(old[None], 1024, generator)[0]
        before = GroupedLogps(old[drawn], ones, offsets, rewards[drawn])
        for _ in range(20):
            logps = table.log_softmax(0)
            optimizer.zero_grad()
            loss(dataclasses.replace(before, logps=logps[drawn]), before).loss.mean().backward()
            optimizer.step()
        kl = (old.exp() * (old - table.detach().log_softmax(0))).sum().item()
        assert 0 < kl < 0.05
        assert ((table.detach().softmax(0) - old.exp()) * rewards).sum() > 0.05


def _train(reference: Tensor, rewards: Tensor, loss: GroupwiseLoss, steps: int = 400) -> Tensor:
    """Train a table on groups of four of its own responses."""
    generator = torch.Generator().manual_seed(0)
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    offsets, ones = torch.arange(0, 257, 4), torch.ones(256)
    for _ in range(steps):
        logps = table.log_softmax(0)
        drawn = logit_tables.draw(logps.detach()[None], 256, generator)[0]
        groups = [GroupedLogps(x[drawn], ones, offsets, rewards[drawn]) for x in (logps, reference)]
        optimizer.zero_grad()
        loss(*groups).loss.mean().backward()
        optimizer.step()
        schedule.step()
    return table.detach().log_softmax(0)


def test_on_own_samples_they_reach_the_optimum_and_the_equilibrium() -> None:
    reference, rewards = online_tables.world(3, 32)
    for name, beta, exact in (
        ("rloo", 0.5, online_tables.best_policy(reference, rewards, 0.5)),
        ("nash_md", 0.1, online_tables.equilibrium(reference, rewards, 0.1)),
    ):
        loss = losses.build(name, beta=beta)
        assert isinstance(loss, GroupwiseLoss)
        policy = _train(reference, rewards, loss)
        assert logit_tables.js(policy, exact).item() <= 5e-3
        assert logit_tables.js(reference, exact).item() > 0.1
