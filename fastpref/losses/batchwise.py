"""Objectives in which the loss of a pair depends on the other pairs of its batch.

The batch is that of the call, in training the micro-batch, so these objectives, and no others,
change with `training.micro_batch_tokens`. For the same reason a pair cannot be reversed on its own,
so they take no soft labels. Notation: see `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpref.logps import SequenceLogps
from fastpref.losses.base import LogRatioLoss, PairwiseLoss, number
from fastpref.utils.lazy_torch import Tensor, logsigmoid, torch


@dataclass(frozen=True)
class BetaDPO(LogRatioLoss):
    """beta-DPO: DPO whose beta grows with the margin of the pair against that of the batch.

    loss:       -LS(b * m), m = tw - tl, b = max(0.001, beta * (1 + alpha * (m - mean of m)))
    incentives: d_w = d_l = b * S(-b * m), b a constant
    source:     Wu et al. 2024, arXiv:2407.08639
    use:        in place of `dpo` where pairs differ much in how informative they are; the mean over
                a small micro-batch is noisy, and another size of it is another objective

    Rewards are beta * t. The mean is over the batch of the call, in training the micro-batch; the
    authors' code has a moving average there and trains on a drawn 80% of the pairs, which is left
    out. No soft labels: b depends on the batch. The default of alpha is from memory, not checked;
    the authors' configuration has 0.
    """

    name: ClassVar[str] = "beta_dpo"
    soft_labels: ClassVar[bool] = False
    alpha: float = number(0.6, at_least=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        m = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        fixed = m.detach()
        b = (self.beta * (1 + self.alpha * (fixed - fixed.mean()))).clamp(min=1e-3)
        return -logsigmoid(b * m)


@dataclass(frozen=True)
class AOT(LogRatioLoss):
    """Alignment via optimal transport: margins of the policy above those of the reference, by rank.

    loss:       -(1 - e) * LS(u) - e * LS(-u), u = beta * (m - q), m = zw - zl, q the margin rw - rl
                of the same rank in the batch
    incentives: d_w = d_l = beta * (1 - e - S(u))
    source:     Melnyk et al. 2024, arXiv:2406.05882
    use:        in place of `dpo` where margins should improve as a whole and not pair by pair; a
                pair is held against the reference of another one, and a small micro-batch has few
                ranks

    e is label_smoothing, rewards are beta * t. Ranks are those within the batch of the call, in
    training the micro-batch. No soft labels: ranks have no reversed pair.
    """

    name: ClassVar[str] = "aot"
    soft_labels: ClassVar[bool] = False
    beta: float = number(0.01, above=0)
    label_smoothing: float = number(0.0, at_least=0, below=0.5)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        ours, theirs = policy.chosen - policy.rejected, reference.chosen - reference.rejected
        return self._smoothed(ours - _same_rank(theirs, ours))

    def _smoothed(self, gap: Tensor) -> Tensor:
        u, e = self.beta * gap, self.label_smoothing
        return -(1 - e) * logsigmoid(u) - e * logsigmoid(-u)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """Unpaired AOT: log-ratios of chosen responses above those of rejected ones, rank by rank.

    loss:       -(1 - e) * LS(u) - e * LS(-u), u = beta * (tw - q), q the tl of the same rank
    incentives: d_w = beta * (1 - e - S(u)), d_l that of the pair in which tl serves as q
    source:     Melnyk et al. 2024, arXiv:2406.05882
    use:        where chosen and rejected responses are not to the same prompts but equally many; as
                with `aot` the result depends on the size of the micro-batch, and uneven numbers are
                for `kto`

    As `aot`; which rejected response belongs to which chosen one does not matter.
    """

    name: ClassVar[str] = "aot_unpaired"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return self._smoothed(chosen - _same_rank(rejected, chosen))


def _same_rank(values: Tensor, like: Tensor) -> Tensor:
    """`values` (B,) reordered so that their ranks are those of `like`."""
    ranks = like.detach().argsort(stable=True).argsort()
    return torch.sort(values, stable=True).values[ranks]


OBJECTIVES: tuple[type[PairwiseLoss], ...] = (BetaDPO, AOT, AOTUnpaired)
