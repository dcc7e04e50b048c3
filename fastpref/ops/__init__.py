"""Fused operations on hidden states and the head: the API is `fastpref.ops.api`."""

from fastpref.ops.api import (
    IGNORE_INDEX,
    SKETCH_ROWS,
    ScoreGeometry,
    TokenStats,
    batch_geometry,
    collision_entropy,
    implementation,
    linear_kl,
    linear_logps,
    linear_logps_and_scores,
    score_geometry,
    segment_sum,
    token_stats,
)

__all__ = [
    "IGNORE_INDEX",
    "SKETCH_ROWS",
    "ScoreGeometry",
    "TokenStats",
    "batch_geometry",
    "collision_entropy",
    "implementation",
    "linear_kl",
    "linear_logps",
    "linear_logps_and_scores",
    "score_geometry",
    "segment_sum",
    "token_stats",
]
