"""Measurements of the Disentanglement Band between two lines of metrics.

The band of the paper is that of a batch, the pairs of an optimizer step: its mean incentives and
mean scores. Each pair also has a band of its own; its scores are more orthogonal than the batch's,
so that its band is wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.dynamics.band import (
    BAND_METRICS,
    PAIR_BAND_METRICS,
    band,
    band_metrics,
    band_sums,
    moving_average,
    pair_band_sums,
)
from fastpref.ops import ScoreGeometry

AVERAGE_METRICS = ("band/log_r_average", "band/log_r_star_average")


class BandMonitor:
    """Bands of batches and of pairs since the last line of metrics.

    momentum: weight of the past in the moving averages of log r and log r* over measured steps.
    """

    def __init__(self, momentum: float, device: torch.device) -> None:
        self._momentum = momentum

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self._batches, self._pairs = zeros(2 * len(BAND_METRICS)), zeros(2 * len(PAIR_BAND_METRICS))
        # Pairs of this rank alone: of the current step, and of complete steps.
        self._step_pairs, self._local_pairs = zeros(self._pairs.numel()), zeros(self._pairs.numel())
        self._averages = zeros(2).fill_(torch.nan)

    def add_batch(self, d_w: Tensor, d_l: Tensor, geometry: ScoreGeometry) -> None:
        """Add a complete step: mean incentives and mean scores of all ranks, each ()."""
        batch = band(d_w, d_l, geometry)
        self._batches += band_sums(batch)
        new = torch.stack([batch.log_r, batch.log_r_star])
        self._averages = moving_average(self._averages, new, self._momentum)

    def add_pairs(self, d_w: Tensor, d_l: Tensor, geometry: ScoreGeometry) -> None:
        """Add the pairs (B,) of a micro-batch."""
        self._step_pairs += pair_band_sums(band(d_w, d_l, geometry))

    def end_step(self) -> None:
        """Count the pairs of the step."""
        self._local_pairs += self._step_pairs
        self._step_pairs.zero_()

    def discard_step(self) -> None:
        """Drop the pairs of the step."""
        self._step_pairs.zero_()

    def metrics(self) -> dict[str, Tensor]:
        """Means since the last call, and moving averages, by name; all ranks call this."""
        self._all_reduce_pairs()
        means = band_metrics(BAND_METRICS, self._batches)
        means |= dict(zip(AVERAGE_METRICS, self._averages.clone(), strict=True))
        means |= band_metrics(PAIR_BAND_METRICS, self._pairs)
        self._batches.zero_()
        self._pairs.zero_()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        self._all_reduce_pairs()
        return {
            "batches": self._batches.tolist(),
            "pairs": self._pairs.tolist(),
            "averages": self._averages.tolist(),
        }

    def load_state_dict(self, state: Any) -> None:
        for name in ("batches", "pairs", "averages"):
            tensor: Tensor = getattr(self, f"_{name}")
            tensor.copy_(torch.tensor(state[name], dtype=torch.float64))

    def _all_reduce_pairs(self) -> None:
        """All-reduce the pairs of this rank into those of all ranks."""
        self._pairs += distributed.all_reduce_sum_(self._local_pairs)
        self._local_pairs.zero_()
