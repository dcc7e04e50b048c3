"""Fused operations on hidden states and the head: the API is `fastpref.ops.api`."""

from fastpref.ops.api import (
    IGNORE_INDEX,
    ScoreGeometry,
    TokenStats,
    collision_entropy,
    implementation,
    linear_kl,
    linear_logps,
    score_geometry,
    segment_sum,
    token_stats,
)

__all__ = [
    "IGNORE_INDEX",
    "ScoreGeometry",
    "TokenStats",
    "collision_entropy",
    "implementation",
    "linear_kl",
    "linear_logps",
    "score_geometry",
    "segment_sum",
    "token_stats",
]
