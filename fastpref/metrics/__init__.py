"""Metrics of a run: sums over a step (`pairs`, `preference`), over a window, and where they go."""

from fastpref.metrics.pairs import (
    PAIR_METRICS,
    Metrics,
    best_and_worst,
    masked_sum,
    mean,
    means,
    pair_sums,
    sums_and_counts,
)
from fastpref.metrics.trackers import JsonLines, TensorBoard, Tracker, WandB, lines, read, trackers
from fastpref.metrics.window import TIMING_METRICS, NonFinite, Window, peak_memory

__all__ = [
    "PAIR_METRICS",
    "TIMING_METRICS",
    "JsonLines",
    "Metrics",
    "NonFinite",
    "TensorBoard",
    "Tracker",
    "WandB",
    "Window",
    "best_and_worst",
    "lines",
    "masked_sum",
    "mean",
    "means",
    "pair_sums",
    "peak_memory",
    "read",
    "sums_and_counts",
    "trackers",
]
