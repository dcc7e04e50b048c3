"""Objectives on preference pairs.

Notation of the docstrings: zw, zl are the summed log-probs of the chosen and the rejected response
under the policy and rw, rl under the reference; nw, nl are their token counts; tw = zw - rw and
aw = zw / nw, likewise tl and al. S is the logistic function and LS its logarithm. d_w = -dL/dzw
and d_l = dL/dzl are the incentives. Losses are those of a hard label; see `PairwiseLoss` for
soft labels and empty responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.logps import SequenceLogps, mean_logps
from fastpref.losses.base import PairwiseLoss, choice, number


@dataclass(frozen=True)
class SFT(PairwiseLoss):
    """Supervised fine-tuning: negative log-likelihood of the chosen response, or of both.

    loss:       -aw, or -(aw + al) / 2 for responses="both"; z in place of a if not average
    incentives: d_w = 1/nw, d_l = 0; for both: d_w = 1/(2 nw), d_l = -1/(2 nl); n = 1 for sums
    source:     maximum likelihood

    The average is over the tokens of each response, so every response weighs the same whatever
    its length. Rewards are the log-probs that enter the loss, a or z. With "both" the label does
    not matter, be it hard or soft.
    """

    name: ClassVar[str] = "sft"
    needs_reference: ClassVar[bool] = False
    responses: Literal["chosen", "both"] = choice("chosen", "both")
    average: bool = choice(True, False)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return mean_logps(logps, lengths) if self.average else logps

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return -chosen if self.responses == "chosen" else -(chosen + rejected) / 2


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Direct preference optimization: logistic loss on the margin of the implicit rewards.

    loss:       -LS(u), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * S(-u)
    source:     Rafailov et al. 2023, Eq. 7, arXiv:2305.18290

    Rewards are beta * t. A soft label p moves the optimum from infinity to u = logit(p).
    """

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True
    beta: float = number(0.1, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * (logps - reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return -logsigmoid(self.margin(policy, reference))


@dataclass(frozen=True)
class CDPO(PairwiseLoss):
    """Conservative DPO: DPO that expects a share of the labels to be flipped.

    loss:       -(1 - e) * LS(u) - e * LS(-u), u = beta * (tw - tl), e = label_smoothing
    incentives: d_w = d_l = beta * (1 - e - S(u))
    source:     Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3 (no arXiv id)

    Rewards are beta * t. The optimum is u = logit(1 - e); with a soft label p as well, the flips
    come on top of it and the optimum is u = logit(p * (1 - e) + (1 - p) * e). The note names no
    default for e; 0.2 is that of the HALOs library.
    """

    name: ClassVar[str] = "cdpo"
    needs_reference: ClassVar[bool] = True
    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.2, at_least=0, below=0.5)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * (logps - reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        return -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """Identity preference optimization: a squared loss that pulls the log-ratio margin to a target.

    loss:       (tw - tl - 1/(2 tau))^2
    incentives: d_w = d_l = 2 * (1/(2 tau) - (tw - tl)), negative beyond the target
    source:     Azar et al. 2023, Eq. 17, arXiv:2310.12036

    Rewards are tau * t. A soft label p moves the optimum to tw - tl = (p - 1/2) / tau. This is the
    paper's form, on summed log-probs; TRL and HALOs average t over the tokens instead, so their
    target is a margin per token and their tau is not comparable.
    """

    name: ClassVar[str] = "ipo"
    needs_reference: ClassVar[bool] = True
    tau: float = number(0.1, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.tau * (logps - reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return ((self.margin(policy, reference) - 0.5) / self.tau).square()


@dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """Simple preference optimization: length-normalised, reference-free, with a target margin.

    loss:       -LS(u - gamma), u = beta * (aw - al)
    incentives: d_w = beta/nw * S(gamma - u), d_l = beta/nl * S(gamma - u)
    source:     Meng et al. 2024, Eq. 6, arXiv:2405.14734

    Rewards are beta * a. gamma is the margin itself, in units of the reward, where the authors'
    code is configured by the ratio gamma / beta. A soft label demands gamma of the reversed pair
    too, -LS(-u - gamma); TRL's label smoothing has -LS(-u + gamma) there.
    """

    name: ClassVar[str] = "simpo"
    needs_reference: ClassVar[bool] = False
    beta: float = number(2.0, above=0)
    gamma: float = number(1.0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * mean_logps(logps, lengths)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return -logsigmoid(self.margin(policy, reference) - self.gamma)


@dataclass(frozen=True)
class CPO(PairwiseLoss):
    """Contrastive preference optimization: reference-free logistic loss plus likelihood of chosen.

    loss:       -LS(u) - lam * zw, u = beta * (zw - zl)
    incentives: d_w = beta * S(-u) + lam, d_l = beta * S(-u)
    source:     Xu et al. 2024, arXiv:2401.08417

    Rewards are beta * z. The likelihood term is the paper's sum over tokens; TRL takes its mean
    over all chosen tokens of the batch, which amounts to about lam / nw in place of lam.
    """

    name: ClassVar[str] = "cpo"
    needs_reference: ClassVar[bool] = False
    beta: float = number(0.1, above=0)
    lam: float = number(1.0, at_least=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * logps

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return -logsigmoid(self.margin(policy, reference)) - self.lam * policy.chosen


@dataclass(frozen=True)
class PMO(PairwiseLoss):
    """Preference matching optimization: DPO with an entropy bonus, a weaker pull to the reference.

    loss:       -LS(u), u = (alpha + beta) * (zw - zl) - beta * (rw - rl)
    incentives: d_w = d_l = (alpha + beta) * S(-u)
    source:     "A fine-grained analysis of pure semantic preference alignment in LLMs", Eq. 5
                (anonymous submission, no arXiv id)

    Rewards are (alpha + beta) * z - beta * r. alpha = 0 is DPO; beta = 0 needs no reference. The
    defaults are the paper's for pure semantic preferences; on benchmarks it uses 0.05 for both.
    """

    name: ClassVar[str] = "pmo"
    alpha: float = number(0.9, at_least=0)
    beta: float = number(0.1, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha + self.beta == 0:
            raise ValueError("alpha: alpha + beta must be > 0, got 0 for both")

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.alpha * logps + self.beta * (logps - reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return -logsigmoid(self.margin(policy, reference))


@dataclass(frozen=True)
class StaPO(PairwiseLoss):
    """Stable preference optimization: keeps the margin per token between two bounds.

    loss:       -LS(beta * (Z - left)) - LS(beta * (right - Z)), Z = aw - al
    incentives: d_w = E/nw, d_l = E/nl, E = beta * (S(-beta * (Z - left)) - S(beta * (Z - right)))
    source:     "Stable preference optimization via two-sided contrastive learning", Eq. 7
                (anonymous submission, no arXiv id)

    left and right are left_margin and right_margin, on Z. Rewards are beta * a. The optimum is the
    middle, Z = (left + right) / 2; both incentives are negative beyond it. The paper does not state
    its beta; the default is that of SimPO, whose Z it shares.
    """

    name: ClassVar[str] = "stapo"
    needs_reference: ClassVar[bool] = False
    beta: float = number(2.0, above=0)
    left_margin: float = number(0.6)
    right_margin: float = number(0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.left_margin > self.right_margin:
            raise ValueError(
                f"left_margin: must be <= right_margin ({self.right_margin}), "
                f"got {self.left_margin}"
            )

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * mean_logps(logps, lengths)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        left, right = self.beta * self.left_margin, self.beta * self.right_margin
        return -logsigmoid(u - left) - logsigmoid(right - u)
