"""Tables of logits trained by online objectives on samples, and their exact optima.

A world has K responses of one token, with a reward each; a policy is a table of K log-probs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.online.nash_md import NashMD, mixture_logits, preference_of_rewards
from fastpref.online.ppo import PPO
from fastpref.online.rollouts import OnlineObjective, Rollouts, mean_loss
from fastpref.reproduce import logit_tables

GROUP = 4  # responses of a group, of the objectives that compare within one
Scorer = Callable[[Tensor, Tensor], Tensor]  # responses (S,), policy (K,) -> rewards (S,)


def train(
    reference: Tensor,  # (K,) log-probs, the start too
    objective: OnlineObjective,
    score: Scorer,
    steps: int,
    *,
    samples: int = 256,
    epochs: int = 1,
    lr: float = 0.05,
    generator: torch.Generator,
) -> Tensor:
    """Train a table by Adam on `samples` responses of its own a step; return its log-probs (K,).

    The learning rate falls linearly to zero. PPO has a value of its own to learn.
    """
    table, value = reference.clone().requires_grad_(), reference.new_zeros(1).requires_grad_()
    optimizer = torch.optim.Adam([table, value], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    offsets, groups = torch.arange(samples + 1), torch.arange(0, samples + 1, GROUP)
    for _ in range(steps):
        policy = table.detach().log_softmax(0)
        drawn = logit_tables.draw(policy[None], samples, generator)[0]
        rollouts = objective.prepare(
            Rollouts(
                offsets,
                old_logps=policy[drawn],
                rewards=score(drawn, policy),
                ref_logps=reference[drawn],
                cu_groups=groups,
                values=value.detach().expand(samples),
            )
        )
        for _ in range(epochs):
            optimizer.zero_grad()
            logps = table.log_softmax(0)[drawn]
            mean_loss(objective, logps, rollouts, value.expand(samples)).backward()
            optimizer.step()
        schedule.step()
    return table.detach().log_softmax(0)


def by_reward(rewards: Tensor) -> Scorer:
    """The reward of each response, from a table (K,)."""
    return lambda drawn, policy: rewards[drawn]


def by_game(
    rewards: Tensor, reference: Tensor, mixture: float, generator: torch.Generator
) -> Scorer:
    """Probability that each response beats one that the mixture of both models samples."""

    def score(drawn: Tensor, policy: Tensor) -> Tensor:
        opponent = mixture_logits(policy, reference, mixture).log_softmax(0)
        other = logit_tables.draw(opponent[None], len(drawn), generator)[0]
        return preference_of_rewards(rewards[drawn], rewards[other])

    return score


def best_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Optimum (K,) of reward − beta * KL(π || π_ref): π ∝ π_ref * exp(r / beta)."""
    return (reference + rewards / beta).log_softmax(0)


def best_policy_of_grpo(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Optimum (K,) of GRPO without the division by the standard deviation.

    On a policy's own samples, the gradient of its penalty k3 is that of KL(π_ref || π), and a mean
    of the group that includes the response itself leaves 1 − 1 / GROUP of the reward's gradient, so
    the optimum is π = beta π_ref / (λ − (1 − 1 / GROUP) r), with the λ that normalizes it.
    """
    scaled = (1 - 1 / GROUP) * rewards
    low, high = scaled.max(), scaled.max() + beta
    for _ in range(200):
        middle = (low + high) / 2
        total = (beta * reference.exp() / (middle - scaled)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return (beta * reference.exp() / (high - scaled)).log().log_softmax(0)


def equilibrium(reference: Tensor, rewards: Tensor, beta: float, mixture: float = 0.0) -> Tensor:
    """Fixed point (K,) of Nash-MD: π ∝ π_ref * exp(P(y ≻ mixture of π and π_ref) / beta).

    At mixture 0 it is the Nash equilibrium of the game with a KL penalty. Damped iteration; raises
    ArithmeticError where it has not converged.
    """
    wins = preference_of_rewards(rewards[:, None], rewards)  # row beats column
    policy = reference
    for _ in range(10_000):
        opponent = mixture_logits(policy, reference, mixture).softmax(0)
        target = (reference + wins @ opponent / beta).log_softmax(0)
        if (target - policy).abs().max() < 1e-12:
            return target
        policy = (0.5 * policy + 0.5 * target).log_softmax(0)
    raise ArithmeticError("equilibrium: 10,000 iterations did not converge")


def world(seed: int, responses: int) -> tuple[Tensor, Tensor]:
    """Reference (K,) log-probs and rewards (K,), logits and rewards drawn from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = torch.randn(2, responses, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), rewards


RESPONSES, STEPS = 32, 600
BETA, NASH_BETA = 0.5, 0.1  # of rewards and of preferences


def distances(seed: int) -> dict[str, float]:
    """Jensen–Shannon divergence, nats, of trained tables of 32 responses from the exact optima."""
    reference, rewards = world(seed, RESPONSES)
    generator = torch.Generator().manual_seed(seed)
    ppo = train(reference, PPO(kl_coef=BETA), by_reward(rewards), STEPS, epochs=2,
                generator=generator)  # fmt: skip
    result = {"ppo": logit_tables.js(ppo, best_policy(reference, rewards, BETA)).item()}
    for mixture in (0.0, 0.5):
        nash = train(
            reference, NashMD(NASH_BETA, mixture),
            by_game(rewards, reference, mixture, generator), STEPS, generator=generator,
        )  # fmt: skip
        exact = equilibrium(reference, rewards, NASH_BETA, mixture)
        result[f"nash-md {mixture:g}"] = logit_tables.js(nash, exact).item()
    return result
