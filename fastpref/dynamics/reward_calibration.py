"""Reward Calibration: rescale the incentives of an objective so that their ratio suits the scores.

For a pair with incentives d_w, d_l and scores s_w, s_l (gradients of the two log-probs), gradient
flow lifts the chosen and lowers the rejected response most robustly where r = d_w / d_l equals
r* = |s_l| / |s_w|. The calibrated log-probs (Eq. 12 of arXiv:2604.18239; sg stops the gradient)

    z_w' = A z_w + (1 - A) sg(z_w)      z_l' = z_l / A + (1 - 1 / A) sg(z_l)      A = (r* / r)^(1/2)

have the values of z_w and z_l, and change the incentives to A d_w and d_l / A: their ratio becomes
r* (Proposition 3.4) and their product does not change.

Per step (Eqs. 61 and 62): log d_w, log d_l, log |s_w| and log |s_l|, averaged over the pairs of the
step and then by an exponential moving average, E. The paper has one triplet per step; for several,
a mean of logarithms extends its geometric mean. Unlike the norms of batch-mean scores in the
paper's Algorithm 2, it does not depend on the distribution of pairs over micro-batches and ranks.

Per pair (Eqs. 63 and 64): log A = clip(E[log r*] - E[log r]) / 2, between

    E[log r*] - log r + log rho   and   E[log r*] - log r - log rho,

with r and the scores' cosine rho of the pair itself, so that its calibrated log-ratio lies within
-log rho of E[log r*]. Nothing is clipped where rho <= 0, since every ratio is in the band.

The averages are those of the last `update`. The statistics of a step are complete only after its
last micro-batch, when the backward pass of the first is already done, so a trainer updates after
the step. Step k is calibrated with the averages up to step k - 1, and the first step is not
calibrated. The paper includes step k; compared with it, log A differs by (1 - momentum) / 2 of that
step's deviation from the averages. If one batch is a whole step, update before calibrating.

Where an incentive is not positive, or a score is zero, the logarithms do not exist. Such a pair is
left out of the averages and is not clipped. It is scaled by the common A: a factor that depended on
the sign of the incentives would shift the point where they vanish. Before the first pair is
counted, A = 1. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpref.dynamics.band import half_band
from fastpref.logps import SequenceLogps, TokenLogps, segment_positions
from fastpref.ops import ScoreGeometry

CALIBRATION_METRICS = (
    "calibration/factor",  # geometric mean of A over pairs
    "calibration/clipped",  # share of pairs whose A was clipped to their band
    "calibration/left_out",  # share of pairs without a logarithm
    "calibration/log_r",  # E[log r] and E[log r*], before calibration
    "calibration/log_r_star",
)


Pairs = TypeVar("Pairs", SequenceLogps, TokenLogps)


class Calibrated(NamedTuple, Generic[Pairs]):
    """A micro-batch whose gradients are calibrated."""

    policy: Pairs  # the same values, with scaled gradients: see `calibrated`
    factor: Tensor  # (B,) A, fp64
    sums: Tensor  # (8,) fp64, for `update` and `metrics`: add over micro-batches and ranks


class RewardCalibration:
    """Reward Calibration with the moving averages that determine A.

    momentum: weight of the past in the averages, in [0, 1).
    eps: floor of the logarithms, log(x + eps), above 0.

    Raises ValueError for a value out of range. Source: arXiv:2604.18239, section 3.3 and C.3.
    """

    def __init__(
        self,
        momentum: float = 0.98,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must be >= 0 and < 1, got {momentum}")
        if not eps > 0:
            raise ValueError(f"eps: must be > 0, got {eps}")
        self.momentum, self.eps = momentum, eps
        # Of log d_w, log d_l, log |s_w|, log |s_l|. NaN until there is a first value.
        self.averages = torch.full((4,), torch.nan, dtype=torch.float64, device=device)

    def calibrate(
        self, policy: Pairs, incentives: tuple[Tensor, Tensor], geometry: ScoreGeometry
    ) -> Calibrated[Pairs]:
        """Log-probs that the objective is applied to, and this micro-batch's statistics.

        policy: B pairs, with a gradient.
        incentives: d_w and d_l, each (B,), of the objective at `policy`: `losses.pair_incentives`.
            If it returns token weights, the scores must include them.
        geometry: of `ops.score_geometry` or `band.parameter_geometry` with `per_pair`, (B,). If it
            is (), the geometry of the mean scores is used for every pair, and the result depends on
            the micro-batches.
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
        new = sums[4:] / sums[1]  # NaN without usable pairs
        moved = self.averages.lerp(new, 1 - self.momentum)
        moved = torch.where(self.averages.isnan(), new, moved)
        self.averages = torch.where(new.isnan(), self.averages, moved)

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """CALIBRATION_METRICS by name, each (): means over the pairs of `sums`, and averages now.

        sums: (8,), added over micro-batches, ranks and the steps that the means cover.
        """
        pairs, usable, log_factor, clipped = sums[:4]
        log_r, log_r_star = self._log_ratios()
        values = (
            (log_factor / pairs).exp(), clipped / pairs, 1 - usable / pairs, log_r, log_r_star,
        )  # fmt: skip
        return dict(zip(CALIBRATION_METRICS, values, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """`averages` (4,) fp64: of log d_w, log d_l, log |s_w|, log |s_l|; NaN before the first."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`. Raises ValueError for another state."""
        averages = state.get("averages")
        if averages is None or averages.shape != (4,) or averages.dtype != torch.float64:
            got = "none" if averages is None else f"{averages.dtype} {tuple(averages.shape)}"
            raise ValueError(
                f"state: expected float64 averages of shape (4,), got {got}; the checkpoint is "
                f"of a run without calibration or of another version"
            )
        self.averages = averages.to(self.averages.device)

    def _gap(self, log_r: Tensor, cosine: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """2 log A of each pair (B,), 0 without averages, and whether the band clipped it."""
        average_r, average_r_star = self._log_ratios()
        common = (average_r_star - average_r).expand_as(log_r)
        center, half_width = average_r_star - log_r, half_band(cosine)
        bounded = torch.clamp(common, center - half_width, center + half_width)
        clipped = usable & (bounded != common) & ~common.isnan()
        return torch.where(clipped, bounded, common).nan_to_num(nan=0.0), clipped

    def _log_ratios(self) -> tuple[Tensor, Tensor]:
        d_w, d_l, s_w, s_l = self.averages
        return d_w - d_l, s_l - s_w


def calibrated(policy: Pairs, factor: Tensor) -> Pairs:
    """The same log-probs, with gradients scaled by A (chosen) and 1 / A (rejected).

    factor: (B,) or (), the A of each pair. Eq. 12 of arXiv:2604.18239. Log-probs per token are
    scaled by the factor of their pair; a divergence `kl` is not scaled, since the scores exclude
    it.
    """
    if isinstance(policy, TokenLogps):
        segment_ids, _ = segment_positions(policy.cu_seqlens, policy.logps.numel())
        sides = torch.cat([factor.expand(policy.pairs), (1 / factor).expand(policy.pairs)])
        return replace(policy, logps=_scale_gradient(policy.logps, sides[segment_ids]))
    return replace(
        policy,
        chosen=_scale_gradient(policy.chosen, factor),
        rejected=_scale_gradient(policy.rejected, 1 / factor),
    )


def _scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    fixed = values.detach()
    # Eq. 12 as sg(z) + A (z - sg(z)): the difference is exactly 0, so the value is exactly z.
    return fixed + factor.to(values.dtype) * (values - fixed)
