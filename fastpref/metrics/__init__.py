"""Metrics of a run: sums over a step (`pairs`, `preference`) and a window, and trackers."""

from fastpref.metrics.pairs import (
    PAIR_METRICS,
    Metrics,
    best_and_worst,
    masked_sum,
    mean,
    means,
    names_by_source,
    pair_sums,
    share_above,
    sums_and_counts,
    sums_by_source,
)
from fastpref.metrics.trackers import (
    JsonLines,
    TensorBoard,
    Tracker,
    WandB,
    iter_records,
    open_trackers,
    read_records,
)
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
    "iter_records",
    "masked_sum",
    "mean",
    "means",
    "names_by_source",
    "open_trackers",
    "pair_sums",
    "peak_memory",
    "read_records",
    "share_above",
    "sums_and_counts",
    "sums_by_source",
]
