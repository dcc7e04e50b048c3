"""Online objectives against formulas written out in fp64, and their gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpref.online.nash_md import NashMD, mixture_logits, preference_of_rewards
from fastpref.online.policy_gradient import GRPO, RLOO, clipped_surrogate, is_clipped, k3
from fastpref.online.ppo import PPO, ValueHead, token_rewards, value_loss
from fastpref.online.rollouts import OnlineObjective, Rollouts, mean_loss

OFFSETS, GROUPS = torch.tensor([0, 2, 5, 6, 10]), torch.tensor([0, 2, 4])


def _rollouts(seed: int = 0) -> tuple[Rollouts, Tensor, Tensor]:
    """Four responses of ten tokens, and log-probs and values of a policy that has moved on."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    old = -1 - noise[0].abs()
    rollouts = Rollouts(
        OFFSETS,
        old_logps=old,
        rewards=torch.rand(4, generator=generator, dtype=torch.float64),
        ref_logps=old + 0.3 * noise[1],
        cu_groups=GROUPS,
        values=noise[2],
    )
    return rollouts, old + 0.3 * noise[3], noise[2] + 0.3 * noise[4]


OBJECTIVES: tuple[OnlineObjective, ...] = (
    PPO(gamma=0.9),
    RLOO(),
    GRPO(clip_high=0.28),
    GRPO.dr(max_tokens=8),
    NashMD(),
    NashMD(per_token=True),
)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradients_are_those_of_the_loss(objective: OnlineObjective) -> None:
    rollouts, logps, values = _rollouts()
    prepared = objective.prepare(rollouts)
    inputs = [logps.requires_grad_()]
    if isinstance(objective, PPO):
        inputs.append(values.requires_grad_())
    if isinstance(objective, NashMD):  # a constant stands in for its stop-gradient
        gradient = torch.autograd.grad(mean_loss(objective, logps, prepared), logps)[0]
        torch.testing.assert_close(gradient, _nash_gradient(objective, rollouts, logps))
        return
    assert torch.autograd.gradcheck(lambda *x: mean_loss(objective, x[0], prepared, *x[1:]), inputs)


def _nash_gradient(objective: NashMD, rollouts: Rollouts, logps: Tensor) -> Tensor:
    assert rollouts.ref_logps is not None
    ratios = (logps - rollouts.ref_logps).detach()
    if not objective.per_token:
        ratios = rollouts.per_token(rollouts.sums(ratios))
    return (0.1 * ratios - rollouts.per_token(rollouts.rewards - 0.5)) / 4


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_minibatches_add_up_to_the_whole(objective: OnlineObjective) -> None:
    rollouts, logps, values = _rollouts()
    prepared = objective.prepare(rollouts)
    whole = objective.loss(logps, prepared, values)
    tokens = torch.tensor([6, 7, 8, 9, 0, 1])
    part = objective.loss(logps[tokens], prepared.select([3, 0]), values[tokens])
    torch.testing.assert_close(part, whole[[3, 0]], rtol=0, atol=1e-15)


@pytest.mark.parametrize("objective", [PPO(whiten_advantages=False), RLOO(), GRPO.dr(8)], ids=repr)
def test_on_the_samples_of_the_policy_the_gradient_is_that_of_reinforce(
    objective: OnlineObjective,
) -> None:
    """Ratios of 1 are not clipped: d loss / d logp is −A of each token."""
    rollouts, _, _ = _rollouts()
    prepared = objective.prepare(rollouts)
    logps = rollouts.old_logps.clone().requires_grad_()
    loss = objective.loss(logps, prepared, rollouts.values).sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    if prepared.token_advantages is None:
        assert prepared.advantages is not None
        expected = prepared.per_token(prepared.advantages)
    else:
        expected = prepared.token_advantages
    scale = 8 if isinstance(objective, GRPO) else 1
    torch.testing.assert_close(gradient, -expected / scale, rtol=0, atol=1e-14)


def test_the_clipped_loss_does_not_pay_for_more_than_the_clip() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    losses = clipped_surrogate(ratios.log(), advantages, 0.2)
    assert losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2], abs=1e-14)
    assert clipped_surrogate(ratios.log(), advantages, 0.2, 0.4)[0] == pytest.approx(-2.8)


def test_the_reward_comes_with_the_last_token_and_the_penalty_with_each() -> None:
    rollouts, _, _ = _rollouts()
    assert rollouts.ref_logps is not None
    expected = -0.05 * (rollouts.old_logps - rollouts.ref_logps)
    for last, reward in zip((1, 4, 5, 9), rollouts.rewards, strict=True):
        expected[last] += reward
    torch.testing.assert_close(token_rewards(rollouts, 0.05), expected, rtol=0, atol=1e-15)


def test_the_value_loss_takes_the_worse_of_the_value_and_the_clipped_one() -> None:
    values = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    returns = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    losses = value_loss(values, torch.zeros(3, dtype=torch.float64), returns, 0.2)
    assert losses.tolist() == pytest.approx([0.32, 3.92, 0.405], abs=1e-15)


def test_ppo_averages_over_tokens_and_the_others_over_responses() -> None:
    rollouts, logps, values = _rollouts()
    ppo = PPO()
    prepared = ppo.prepare(rollouts)
    assert prepared.token_advantages is not None and prepared.returns is not None
    by_token = clipped_surrogate(logps - rollouts.old_logps, prepared.token_advantages, 0.2)
    assert rollouts.values is not None
    by_token = by_token + 0.1 * value_loss(values, rollouts.values, prepared.returns, 0.2)
    assert mean_loss(ppo, logps, prepared, values).item() == pytest.approx(by_token.mean().item())
    grpo = GRPO(beta=0.0, clip=9.0)
    prepared = grpo.prepare(rollouts)
    ratios = (logps - rollouts.old_logps).exp()
    assert prepared.advantages is not None
    responses = [
        -(a * ratios[start:end]).mean().item()
        for a, start, end in zip(prepared.advantages, OFFSETS, OFFSETS[1:], strict=False)
    ]
    assert mean_loss(grpo, logps, prepared).item() == pytest.approx(sum(responses) / 4, abs=1e-14)


def test_the_advantage_of_rloo_contains_the_penalty() -> None:
    rollouts, _, _ = _rollouts()
    penalized = rollouts.rewards - 0.05 * rollouts.sums(rollouts.log_ratios())
    advantages = RLOO().prepare(rollouts).advantages
    assert advantages is not None
    differences = [penalized[0] - penalized[1], penalized[2] - penalized[3]]
    expected = [differences[0], -differences[0], differences[1], -differences[1]]
    torch.testing.assert_close(advantages, torch.stack(expected), rtol=0, atol=1e-15)
    whitened = RLOO(normalize_advantages=True).prepare(rollouts).advantages
    assert whitened is not None and whitened.std().item() == pytest.approx(1, abs=1e-6)
    without = replace(rollouts, ref_logps=None)
    assert RLOO(beta=0.0).prepare(without).advantages is not None


def test_k3_estimates_the_divergence_and_is_0_at_the_reference() -> None:
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.2, 0.8], [0.5, 0.5]))
    exact = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx(exact, abs=1e-15)
    assert k3(p, p).tolist() == [0.0, 0.0]


def test_the_cross_terms_are_the_difference_between_both_forms_of_nash_md() -> None:
    """For responses of one token they are the same; for longer ones they are not."""
    rollouts, logps, _ = _rollouts()
    whole, by_token = (NashMD(per_token=k).loss(logps, rollouts) for k in (False, True))
    assert whole[2].item() == pytest.approx(by_token[2].item(), abs=1e-15)
    assert (whole - by_token).abs().min(0).values.item() < 1e-12
    assert all(abs(whole[k] - by_token[k]) > 1e-4 for k in (0, 1, 3))


def test_the_mixture_is_geometric() -> None:
    policy, reference = (
        torch.tensor(x, dtype=torch.float64).log() for x in ([0.1, 0.9], [0.4, 0.6])
    )
    mixed = mixture_logits(policy + 3, reference, 0.25).softmax(0)
    first, second = 0.1**0.75 * 0.4**0.25, 0.9**0.75 * 0.6**0.25
    assert mixed.tolist() == pytest.approx([first / (first + second), second / (first + second)])
    for share, alone in ((0.0, policy), (1.0, reference)):
        torch.testing.assert_close(mixture_logits(policy, reference, share), alone)


def test_preferences_are_probabilities() -> None:
    wins = preference_of_rewards(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2 - math.log(3)]))
    assert wins.tolist() == pytest.approx([0.5, 0.75])
    rollouts, _, _ = _rollouts()
    with pytest.raises(ValueError, match=r"rewards: Nash-MD takes probabilities in \[0, 1\]"):
        NashMD().prepare(replace(rollouts, rewards=rollouts.rewards + 1))


def test_the_value_head_begins_at_0_and_ppo_requires_values() -> None:
    head = ValueHead(4)
    hidden = torch.randn(3, 4, dtype=torch.bfloat16)
    assert head(hidden).tolist() == [0.0] * 3 and head(hidden).dtype == torch.float32
    rollouts, _, _ = _rollouts()
    with pytest.raises(ValueError, match="values: PPO needs a value of each token"):
        PPO().prepare(replace(rollouts, values=None))


def test_a_token_is_clipped_where_the_surrogate_has_no_gradient() -> None:
    log_ratios = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 0.27], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    clipped_surrogate(log_ratios, advantages, 0.2, 0.3).sum().backward()
    assert log_ratios.grad is not None
    clipped = is_clipped(log_ratios, advantages, 0.2, 0.3)
    assert clipped.tolist() == [True, False, False, True, False, True]
    assert (log_ratios.grad == 0).tolist() == clipped.tolist()
