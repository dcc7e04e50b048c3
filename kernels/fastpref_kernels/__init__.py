"""Triton kernels for preference training: token log-probs, their scores, and KL, without logits.

Needs torch and triton alone. The formula and the memory cost of each operation head its file.
"""

from .forward import TokenStats, linear_logps_forward
from .linear_kl import linear_kl
from .linear_logps import linear_logps
from .score_geometry import ScoreGeometry, score_geometry

__all__ = [
    "ScoreGeometry",
    "TokenStats",
    "linear_kl",
    "linear_logps",
    "linear_logps_forward",
    "score_geometry",
]
