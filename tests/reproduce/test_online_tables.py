"""Online objectives on a world of 32 responses reach the optima that can be computed."""

from __future__ import annotations

import pytest
import torch

from fastpref.online.policy_gradient import GRPO, RLOO
from fastpref.online.rollouts import OnlineObjective
from fastpref.reproduce import logit_tables
from fastpref.reproduce import online_tables as tables


def test_ppo_and_nash_md_reach_their_optima_from_samples() -> None:
    distances = tables.distances(seed=0)
    assert distances.keys() == {"ppo", "nash-md 0", "nash-md 0.5"}
    assert max(distances.values()) <= 2e-3


@pytest.mark.parametrize(
    ("objective", "optimum"),
    [
        (RLOO(beta=0.5), tables.best_policy),
        (GRPO(beta=0.5, scale_rewards="none"), tables.best_policy_of_grpo),
    ],
    ids=["rloo", "grpo"],
)
def test_the_others_do_too(objective: OnlineObjective, optimum: object) -> None:
    reference, rewards = tables.world(1, 32)
    generator = torch.Generator().manual_seed(1)
    policy = tables.train(reference, objective, tables.by_reward(rewards), 400, generator=generator)
    exact = optimum(reference, rewards, 0.5)  # type: ignore[operator]
    assert logit_tables.js(policy, exact).item() <= 2e-3
    assert logit_tables.js(reference, exact).item() > 0.05


def test_optima_fulfill_their_equations() -> None:
    reference, rewards = tables.world(2, 32)
    best = tables.best_policy(reference, rewards, 0.5)
    gap = rewards - 0.5 * (best - reference)  # reward and penalty are the same for all responses
    assert (gap.max() - gap.min()).item() < 1e-12
    nash = tables.equilibrium(reference, rewards, 0.1)
    wins = torch.sigmoid(rewards[:, None] - rewards) @ nash.exp()
    gap = wins - 0.1 * (nash - reference)
    assert (gap.max() - gap.min()).item() < 1e-10
    assert nash.exp().sum().item() == pytest.approx(1, abs=1e-14)
    grpo = tables.best_policy_of_grpo(reference, rewards, 0.5)
    gap = 0.75 * rewards + 0.5 * (reference - grpo).exp()
    assert (gap.max() - gap.min()).item() < 1e-8
    other = tables.equilibrium(reference, rewards, 0.1, mixture=0.5)
    assert logit_tables.js(nash, other).item() > 1e-3
