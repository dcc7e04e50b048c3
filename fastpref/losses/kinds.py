"""Unions over the kinds of objectives: pairwise, token-level, pointwise and groupwise."""

from __future__ import annotations

from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses.base import LossOutput, PairwiseLoss
from fastpref.losses.groupwise import GroupwiseLoss, GroupwiseOutput
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.losses.token_level import TokenLevelLoss

Objective = PairwiseLoss | TokenLevelLoss | PointwiseLoss | GroupwiseLoss
Logps = SequenceLogps | TokenLogps | UnpairedLogps | GroupedLogps
Output = LossOutput | PointwiseOutput | GroupwiseOutput
