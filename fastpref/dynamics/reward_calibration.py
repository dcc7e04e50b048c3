"""Reward Calibration: rescale the incentives of an objective so that their ratio suits the scores.

For incentives d_w, d_l and scores s_w, s_l (gradients of the two log-probs), gradient flow lifts
the chosen and lowers the rejected responses most robustly where r = d_w / d_l equals
r* = |s_l| / |s_w|. The calibrated log-probs (Eq. 12 of arXiv:2604.18239; sg stops the gradient)

    z_w' = A z_w + (1 - A) sg(z_w)      z_l' = z_l / A + (1 - 1 / A) sg(z_l)      A = (r* / r)^(1/2)

have the values of z_w and z_l, and change the incentives to A d_w and d_l / A: their ratio becomes
r* (Proposition 3.4) and their product does not change.

`RewardCalibration` is the paper's Algorithm 2: the statistics are those of the batch of an
optimizer step, over all its micro-batches and ranks, and the logarithm comes last:

    d_w, d_l   the means of the pairs' incentives
    s_w, s_l   the scores of the mean log-probs, `ops.batch_geometry`
    E[log d_w], E[log d_l], E[log |s_w|], E[log |s_l|]    averaged over steps (Eqs. 61 and 62)
    log A = clip(E[log r*] - E[log r]) / 2                between (Eqs. 63 and 64)
            E[log r*] - log r + log rho   and   E[log r*] - log r - log rho

with r and the scores' cosine rho of the batch, so that its calibrated log-ratio lies within
-log rho of E[log r*]. Nothing is clipped where rho <= 0, since every ratio is in the band. All
pairs have the same A. `fastpref.dynamics.pair_calibration` has another reading, with a factor for
each pair.

The averages are those of the steps before the calibrated one, so the first step is not calibrated;
the paper includes the step itself. r and rho are those of the step itself if it is known before
its backward pass. Where a step is accumulated from several micro-batches, it is complete only after
its last one, when the backward pass of the first is already done; r and rho are then those of the
last complete step.

Where the mean of an incentive is not positive, or a score is zero, the logarithm does not exist.
Such a step does not enter the averages, and A is 1 where its statistics would be used. Nothing
here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpref.dynamics.band import half_band, moving_average
from fastpref.logps import SequenceLogps, TokenLogps, segment_positions
from fastpref.ops import ScoreGeometry, batch_geometry

CALIBRATION_METRICS = (
    "calibration/factor",  # geometric mean of A
    "calibration/clipped",  # share of steps (or pairs) whose A was clipped to the band
    "calibration/left_out",  # share of steps (or pairs) without a logarithm
    "calibration/log_r",  # E[log r] and E[log r*], before calibration
    "calibration/log_r_star",
)

Pairs = TypeVar("Pairs", SequenceLogps, TokenLogps)


class BatchStatistics(NamedTuple):
    """Mean incentives and mean scores of the pairs of an optimizer step; each ()."""

    d_w: Tensor
    d_l: Tensor
    geometry: ScoreGeometry  # `ops.batch_geometry`

    @classmethod
    def of_sums(cls, incentives: Tensor, scores: Tensor) -> BatchStatistics:
        """Statistics from sums over micro-batches and ranks.

        incentives: (3,) fp64 sums of d_w and of d_l, and the number of pairs.
        scores: (2, ...) sums of the chosen and of the rejected scores, or sketches of them.
        """
        d_w, d_l, pairs = incentives
        return cls(d_w / pairs, d_l / pairs, batch_geometry(scores, pairs))


class LogAverages:
    """Moving averages of log d_w, log d_l, log |s_w| and log |s_l| over optimizer steps.

    momentum: weight of the past in the averages, in [0, 1).
    eps: floor of the logarithms, log(x + eps), above 0.

    Raises ValueError for a value out of range. Source: arXiv:2604.18239, appendix C.3.
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
        # NaN until there is a first value.
        self.averages = torch.full((4,), torch.nan, dtype=torch.float64, device=device)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """E[log r] and E[log r*], each (); NaN before the first step."""
        d_w, d_l, s_w, s_l = self.averages
        return d_w - d_l, s_l - s_w

    def state_dict(self) -> dict[str, Tensor]:
        """`averages` (4,) fp64: of log d_w, log d_l, log |s_w|, log |s_l|; NaN before the first."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`. Raises ValueError for another state."""
        self.averages = self._vector(state, "averages", 4).to(self.averages.device)

    def _average(self, new: Tensor) -> None:
        """Add logarithms (4,) to the averages, unless they are NaN; the first initialize them."""
        self.averages = moving_average(self.averages, new, self.momentum)

    def _vector(self, state: dict[str, Tensor], name: str, size: int) -> Tensor:
        vector = state.get(name)
        if vector is None or vector.shape != (size,) or vector.dtype != torch.float64:
            got = "none" if vector is None else f"{vector.dtype} {tuple(vector.shape)}"
            raise ValueError(
                f"state: expected float64 {name} of shape ({size},), got {got}; the checkpoint is "
                f"of a run without this calibration or of another version"
            )
        return vector


class RewardCalibration(LogAverages):
    """Reward Calibration by the statistics of a batch: Algorithm 2 of arXiv:2604.18239.

    momentum, eps, device: as in `LogAverages`.
    """

    def __init__(
        self,
        momentum: float = 0.98,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(momentum, eps, device)
        # log r and rho of the last step; NaN before the first and after one without a logarithm.
        self.last = torch.full((2,), torch.nan, dtype=torch.float64, device=device)

    def factor(self, statistics: BatchStatistics | None = None) -> tuple[Tensor, Tensor]:
        """A (), fp64, and (2,) for `metrics`: log A, and whether the band clipped it.

        statistics: of the step to calibrate, whose band clips A, if they are known before its
            backward pass; None for those of the last `update`.
        """
        last = self.last if statistics is None else self._ratio_and_cosine(statistics)
        log_r, cosine = last
        average_r, average_r_star = self.log_ratios()
        gap = average_r_star - average_r
        center, half_width = average_r_star - log_r, half_band(cosine)
        bounded = torch.clamp(gap, center - half_width, center + half_width)
        log_factor = (bounded / 2).nan_to_num(nan=0.0)
        clipped = (bounded != gap) & ~bounded.isnan()
        return log_factor.exp(), torch.stack([log_factor, clipped.double()])

    def update(self, statistics: BatchStatistics) -> Tensor:
        """Add a complete optimizer step to the averages; return whether it is left out, ()."""
        d_w, d_l, (s_w, s_l, _) = statistics
        values = torch.stack([d_w, d_l, s_w, s_l]).double()
        self.last = self._ratio_and_cosine(statistics)
        left_out = self.last[0].isnan()
        self._average((values + self.eps).log().masked_fill(left_out, torch.nan))
        return left_out

    def metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """CALIBRATION_METRICS by name, each (): means over steps, and averages now.

        sums: (4,) fp64 number of steps, those left out, and the values of `factor`, added up.
        """
        steps, left_out, log_factor, clipped = sums
        values = (
            (log_factor / steps).exp(), clipped / steps, left_out / steps, *self.log_ratios(),
        )  # fmt: skip
        return dict(zip(CALIBRATION_METRICS, values, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """`averages` (4,) as in `LogAverages`, and `last` (2,), log r and rho of the last step."""
        return {**super().state_dict(), "last": self.last}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.last = self._vector(state, "last", 2).to(self.averages.device)

    @staticmethod
    def _ratio_and_cosine(statistics: BatchStatistics) -> Tensor:
        """log r and rho (2,), NaN where a logarithm of the averages does not exist."""
        d_w, d_l, (s_w, s_l, cosine) = statistics
        values = torch.stack([d_w, d_l, s_w, s_l]).double()
        usable = ((values > 0) & values.isfinite()).all()
        pair = torch.stack([values[0].log() - values[1].log(), cosine.double()])
        return pair.where(usable, torch.nan)


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
