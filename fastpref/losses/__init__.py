"""Preference objectives: `build("dpo", beta=0.05)` makes one, `describe("dpo")` explains it."""

from fastpref.losses.base import Kind, Loss, LossOutput, PairwiseLoss
from fastpref.losses.combined import config_of
from fastpref.losses.groupwise import GroupwiseLoss, GroupwiseOutput
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.losses.registry import (
    NOTATION,
    Description,
    Logps,
    Output,
    build,
    describe,
    from_config,
    incentives,
    names,
    pair_incentives,
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
    "Output",
    "PairwiseLoss",
    "PointwiseLoss",
    "PointwiseOutput",
    "TokenLevelLoss",
    "build",
    "config_of",
    "describe",
    "from_config",
    "incentives",
    "names",
    "pair_incentives",
]
