"""Reward Calibration: rescale the incentives of an objective so that their ratio suits the scores.

For a pair with incentives d_w, d_l and scores s_w, s_l (gradients of the two log-probs), gradient
flow lifts the chosen and lowers the rejected response most robustly where r = d_w / d_l equals
r* = |s_l| / |s_w|. The calibrated log-probs (Eq. 12 of arXiv:2604.18239; sg stops the gradient)

    z_w' = A z_w + (1 - A) sg(z_w)      z_l' = z_l / A + (1 - 1 / A) sg(z_l)      A = (r* / r)^(1/2)

have the values of z_w and z_l, and turn the incentives into A d_w and d_l / A: their ratio becomes
r* (Proposition 3.4) and their product stays.

Per step (Eqs. 61 and 62): log d_w, log d_l, log |s_w| and log |s_l|, averaged over the pairs of the
step and then by an exponential moving average, E. The paper writes one triplet a step; for more, a
mean of logarithms continues its geometric mean. Unlike the norms of batch-mean scores in the
paper's Algorithm 2, it does not depend on how pairs are spread over micro-batches and ranks.

Per pair (Eqs. 63 and 64): log A = clip(E[log r*] - E[log r]) / 2, between

    E[log r*] - log r + log rho   and   E[log r*] - log r - log rho,

with r and the scores' cosine rho of the pair itself, so that its calibrated log-ratio lies within
-log rho of E[log r*]. There is no clip where rho <= 0: every ratio is in the band.

Which averages: those that `update` has made so far. The statistics of a step are complete only
after its last micro-batch, when the first has been through its backward pass; so a trainer updates
after the step. Step k is calibrated with the averages up to step k - 1, the first step not at all.
Against the paper, which takes in step k first, log A then differs by (1 - momentum) / 2 of that
step's deviation from the averages. With a whole step in one batch, update before calibrating.

Where an incentive is not positive, or a score is zero, the logarithms do not exist. Such a pair is
left out of the averages and has no clip. It shares the common A: a factor that came and went with
the sign of the incentives would move the point where they vanish. While no pair has been counted
at all, A = 1. Nothing here waits for the device.
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

    policy: Pairs  # as it came, but for its gradient: see `calibrated`
    factor: Tensor  # (B,) A, fp64
    sums: Tensor  # (8,) fp64, for `update` and `metrics`: add over micro-batches and ranks


class RewardCalibration:
    """The moving averages behind A.

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
        """Log-probs for the objective to be applied to, and this micro-batch's statistics.

        policy: B pairs, with a gradient.
        incentives: d_w and d_l, each (B,), of the objective at `policy`: `losses.pair_incentives`,
            whose token weights, if it has any, belong into the scores too.
        geometry: of `ops.score_geometry` or `band.parameter_geometry` with `per_pair`, (B,). With
            () that of the micro-batch's mean scores stands for each of its pairs, and the result
            depends on the micro-batches.
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
        """Take the statistics of an optimizer step into the averages, which start at the first.

        sums: (8,) `Calibrated.sums`, added over the step's micro-batches and ranks. A step that
        left out all its pairs changes nothing.
        """
        new = sums[4:] / sums[1]  # NaN where there was none
        moved = self.averages.lerp(new, 1 - self.momentum)
        moved = torch.where(self.averages.isnan(), new, moved)
        self.averages = torch.where(new.isnan(), self.averages, moved)

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """CALIBRATION_METRICS by name, each (): means over the pairs of `sums`, and averages now.

        sums: (8,), added over micro-batches, ranks and as many steps as the means are to cover.
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
        """Continue from a `state_dict`. Raises ValueError where it is not one."""
        averages = state.get("averages")
        if averages is None or averages.shape != (4,) or averages.dtype != torch.float64:
            found = "none" if averages is None else f"{averages.dtype} {tuple(averages.shape)}"
            raise ValueError(
                f"state: expected float64 averages of shape (4,), got {found}; the checkpoint is "
                f"of a run without calibration or of another version"
            )
        self.averages = averages.to(self.averages.device)

    def _gap(self, log_r: Tensor, cosine: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """2 log A of each pair, (B,) and 0 without averages, and whether the band clipped it."""
        average_r, average_r_star = self._log_ratios()
        common = (average_r_star - average_r).expand_as(log_r)
        centre, half_width = average_r_star - log_r, half_band(cosine)
        bounded = torch.clamp(common, centre - half_width, centre + half_width)
        clipped = usable & (bounded != common) & ~common.isnan()
        return torch.where(clipped, bounded, common).nan_to_num(nan=0.0), clipped

    def _log_ratios(self) -> tuple[Tensor, Tensor]:
        d_w, d_l, s_w, s_l = self.averages
        return d_w - d_l, s_l - s_w


def calibrated(policy: Pairs, factor: Tensor) -> Pairs:
    """The same log-probs, with gradients scaled by A (chosen) and 1 / A (rejected).

    factor: (B,) or (), the A of each pair. Eq. 12 of arXiv:2604.18239. Of log-probs per token the
    factor is that of the pair, and a divergence `kl` is not scaled: it is no part of the scores.
    """
    if isinstance(policy, TokenLogps):
        owners, _ = segment_positions(policy.cu_seqlens, policy.logps.numel())
        sides = torch.cat([factor.expand(policy.pairs), (1 / factor).expand(policy.pairs)])
        return replace(policy, logps=_scale_gradient(policy.logps, sides[owners]))
    return replace(
        policy,
        chosen=_scale_gradient(policy.chosen, factor),
        rejected=_scale_gradient(policy.rejected, 1 / factor),
    )


def _scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    fixed = values.detach()
    # Eq. 12 as sg(z) + A (z - sg(z)): the difference is exactly 0, so the value is exactly z.
    return fixed + factor.to(values.dtype) * (values - fixed)
