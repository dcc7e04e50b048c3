"""Options of objectives on rollouts: names, bounds, and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.fused import FusedPreferenceLoss
from fastpref.logps import GroupedLogps
from fastpref.online.nash_md import NashMD
from fastpref.online.objectives import objective_of
from fastpref.online.policy_gradient import GRPO
from fastpref.online.ppo import PPO


@pytest.mark.parametrize(("name", "online"), [("ppo", PPO), ("grpo", GRPO)])
def test_options_say_what_they_are_and_stand_apart(name: str, online: type[Any]) -> None:
    about, options = losses.describe(name), losses.build(name)
    assert name in losses.rollout_names() and name not in losses.names()
    assert all((about.summary, about.formula, about.incentives, about.source, about.use))
    assert about.needs_reference
    assert losses.config_of(options) == {"name": name, **about.defaults}
    assert objective_of(options) == online()
    logps = GroupedLogps(torch.zeros(2), torch.ones(2), torch.tensor([0, 2]), torch.zeros(2))
    with pytest.raises(ValueError, match=f"objective: {name} learns from rollouts, not from log-p"):
        losses.evaluate(options, logps, logps)
    with pytest.raises(ValueError, match=f"loss: {name} learns from samples of the policy, which"):
        FusedPreferenceLoss(name)
    with pytest.raises(ValueError, match=rf"loss\[1\].name: {name} is not an objective on pairs"):
        losses.from_config([{"name": "dpo"}, {"name": name}])
    with pytest.raises(ValueError, match=f"wpo: not a parameter of {name}, which accepts "):
        losses.build(name, wpo=True)


def test_distillation_says_what_it_is() -> None:
    about = losses.describe("distillation")
    assert all((about.summary, about.formula, about.source, about.use))
    assert not about.needs_reference and about.defaults["teacher"] is None
    with pytest.raises(ValueError, match="divergence: must be one of 'reverse_kl', 'forward"):
        losses.build("distillation", divergence="reverse")


def test_nash_md_takes_rollouts_with_a_mixture_only() -> None:
    assert not losses.build("nash_md").of_rollouts
    options = losses.build("nash_md", mixture=0.5)
    assert options.of_rollouts and objective_of(options) == NashMD(mixture=0.5)
    logps = GroupedLogps(torch.zeros(2), torch.ones(2), torch.tensor([0, 2]), torch.zeros(2))
    assert losses.evaluate(losses.build("nash_md"), logps, logps).loss.shape == (1,)
    with pytest.raises(ValueError, match="objective: nash_md learns from rollouts, not from log-p"):
        losses.evaluate(options, logps, logps)
    with pytest.raises(ValueError, match="mixture: must be >= 0 and <= 1, got 2"):
        losses.build("nash_md", mixture=2)


def test_a_coefficient_of_0_needs_no_reference() -> None:
    assert not losses.build("ppo", kl_coef=0).needs_reference
    assert not losses.build("grpo", beta=0).needs_reference


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("ppo", {"lam": 1.5}, "lam: must be >= 0 and <= 1, got 1.5"),
        ("ppo", {"value_lr": 0}, "value_lr: must be > 0, got 0"),
        ("grpo", {"clip_high": 0}, "clip_high: must be > 0, got 0"),
        ("grpo", {"max_tokens": "many"}, "max_tokens: must be a number, got 'many'"),
        ("grpo", {"scale_rewards": True}, "scale_rewards: must be one of 'group', 'batch', 'none'"),
    ],
)
def test_a_value_out_of_bounds(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        losses.build(name, **options)
