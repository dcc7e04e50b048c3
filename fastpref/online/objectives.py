"""The objective on rollouts that the options of a config name."""

from __future__ import annotations

from dataclasses import fields

from fastpref.losses import Objective, on_policy
from fastpref.losses.rollout import GRPOOptions, PPOOptions
from fastpref.online.nash_md import NashMD
from fastpref.online.policy_gradient import GRPO
from fastpref.online.ppo import PPO

RolloutObjective = PPO | GRPO | NashMD


def objective_of(options: Objective) -> RolloutObjective:
    """Return the objective on rollouts with these options."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    if isinstance(options, PPOOptions):
        return PPO(**values)
    if isinstance(options, GRPOOptions):
        return GRPO(**values)
    assert isinstance(options, on_policy.NashMD) and options.of_rollouts
    return NashMD(**values)
