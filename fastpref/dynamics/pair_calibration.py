"""Reward Calibration with a factor for each pair: another reading of arXiv:2604.18239.

The paper has one triplet per step. `RewardCalibration` extends it to batches as the paper's
Algorithm 2 does, by batch means; here a mean of logarithms extends its geometric mean instead.

Per step: log d_w, log d_l, log |s_w| and log |s_l|, averaged over the pairs of the step and then by
an exponential moving average, E. Per pair: log A = clip(E[log r*] - E[log r]) / 2, between

    E[log r*] - log r + log rho   and   E[log r*] - log r - log rho,

with r and the scores' cosine rho of the pair itself, so that its calibrated log-ratio lies within
-log rho of E[log r*]. With one pair a step both readings agree.

With summed log-probs the incentives of decided pairs are e^-large, and rule a mean of logarithms:
for objectives with a likelihood term (CPO) the common factor is then far too large for the other
pairs. Use `RewardCalibration` unless you compare the two.

A pair whose logarithms do not exist is left out of the averages and is not clipped. It is scaled by
the common A: a factor that depended on the sign of the incentives would shift the point where they
vanish. Before the first pair is counted, A = 1. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Generic, NamedTuple

import torch
from torch import Tensor

from fastpref.dynamics.band import half_band
from fastpref.dynamics.reward_calibration import (
    CALIBRATION_METRICS,
    LogAverages,
    Pairs,
    calibrated,
)
from fastpref.ops import ScoreGeometry


class Calibrated(NamedTuple, Generic[Pairs]):
    """A micro-batch whose gradients are calibrated."""

    policy: Pairs  # the same values, with scaled gradients: see `calibrated`
    factor: Tensor  # (B,) A, fp64
    sums: Tensor  # (8,) fp64, for `update` and `metrics`: add over micro-batches and ranks


class PairCalibration(LogAverages):
    """Reward Calibration with a factor for each pair, and averages over pairs of logarithms.

    momentum, eps, device: as in `LogAverages`.
    """

    def calibrate(
        self, policy: Pairs, incentives: tuple[Tensor, Tensor], geometry: ScoreGeometry
    ) -> Calibrated[Pairs]:
        """Log-probs that the objective is applied to, and this micro-batch's statistics.

        policy: B pairs, with a gradient.
        incentives: d_w and d_l, each (B,), of the objective at `policy`: `losses.pair_incentives`.
            If it returns token weights, the scores must include them.
        geometry: of `ops.score_geometry` or `band.parameter_geometry` with `per_pair`, (B,).
        """
        columns = torch.broadcast_tensors(*incentives, *geometry)
        table = torch.stack(columns).detach().double()
        values, cosine = table[:4], table[4]
        usable = ((values > 0) & values.isfinite()).all(0)
        gap, clipped = self._gap(values[0].log() - values[1].log(), cosine, usable)
        factor = (gap / 2).exp()
        counts = torch.stack([torch.ones_like(gap), usable, gap / 2, clipped])
        logs = (values + self.eps).log().where(usable, 0.0)
        return Calibrated(calibrated(policy, factor), factor, torch.cat([counts, logs]).sum(1))

    def update(self, sums: Tensor) -> None:
        """Update the averages with the statistics of an optimizer step; the first initializes them.

        sums: (8,) `Calibrated.sums`, added over the step's micro-batches and ranks. A step whose
        pairs are all left out changes nothing.
        """
        self._average(sums[4:] / sums[1])  # NaN without usable pairs

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """CALIBRATION_METRICS by name, each (): means over the pairs of `sums`, and averages now.

        sums: (8,), added over micro-batches, ranks and the steps that the means cover.
        """
        pairs, usable, log_factor, clipped = sums[:4]
        log_r, log_r_star = self.log_ratios()
        values = (
            (log_factor / pairs).exp(), clipped / pairs, 1 - usable / pairs, log_r, log_r_star,
        )  # fmt: skip
        return dict(zip(CALIBRATION_METRICS, values, strict=True))

    def _gap(self, log_r: Tensor, cosine: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """2 log A of each pair (B,), 0 without averages, and whether the band clipped it."""
        average_r, average_r_star = self.log_ratios()
        common = (average_r_star - average_r).expand_as(log_r)
        center, half_width = average_r_star - log_r, half_band(cosine)
        bounded = torch.clamp(common, center - half_width, center + half_width)
        clipped = usable & (bounded != common) & ~common.isnan()
        return torch.where(clipped, bounded, common).nan_to_num(nan=0.0), clipped
