"""Preference objectives: `build("dpo", beta=0.05)` makes one, `describe("dpo")` explains it.

`evaluate(objective, policy, reference)` calls one, on a GPU by its kernel where it has one.
"""

from fastpref.losses.base import Kind, Loss, LossOutput, PairwiseLoss
from fastpref.losses.combined import config_of
from fastpref.losses.dispatch import evaluate, has_kernel, pair_incentives
from fastpref.losses.groupwise import GroupwiseLoss, GroupwiseOutput
from fastpref.losses.kinds import Logps, Objective, Output
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.losses.registry import (
    NOTATION,
    Description,
    build,
    describe,
    from_config,
    incentives,
    names,
    reward_names,
    rollout_names,
)
from fastpref.losses.token_level import TokenLevelLoss

__all__ = [
    "NOTATION",
    "Description",
    "GroupwiseLoss",
    "GroupwiseOutput",
    "Kind",
    "Logps",
    "Loss",
    "LossOutput",
    "Objective",
    "Output",
    "PairwiseLoss",
    "PointwiseLoss",
    "PointwiseOutput",
    "TokenLevelLoss",
    "build",
    "config_of",
    "describe",
    "evaluate",
    "from_config",
    "has_kernel",
    "incentives",
    "names",
    "pair_incentives",
    "reward_names",
    "rollout_names",
]
