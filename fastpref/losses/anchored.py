"""Objectives that hold each response to an anchor of its own, so that zw and zl pull unequally.

They need a reference and sum over tokens. Notation and soft labels: see `base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastpref.logps import SequenceLogps
from fastpref.losses.base import LogRatioLoss, PairwiseLoss, number
from fastpref.losses.numerics import DDRO_RATIO_LIMIT, exp_linear, from_fair_coin, log1mexp
from fastpref.utils.lazy_torch import Tensor, logsigmoid


@dataclass(frozen=True)
class DPOP(LogRatioLoss):
    """DPO-positive: DPO with a penalty where the chosen response falls below its reference.

    loss:       -LS(v), v = beta * (tw - tl - lam * max(0, -tw))
    incentives: d_w = beta * S(-v) * (1 + lam * [tw < 0]), d_l = beta * S(-v)
    source:     Pal et al. 2024, arXiv:2402.13228
    use:        in place of `dpo` where it lowers the chosen responses; the penalty overrules the
                margin as long as they are below their reference, and arXiv:2505.23761 found no
                setting that was reliable over several epochs

    Rewards are beta * t, without the penalty. The defaults are from memory of the paper, not
    checked.
    """

    name: ClassVar[str] = "dpop"
    beta: float = number(0.3, above=0)
    lam: float = number(50.0, at_least=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return -logsigmoid(chosen - rejected - self.lam * (-chosen).relu())


@dataclass(frozen=True)
class CalDPO(LogRatioLoss):
    """Calibrated DPO: logistic loss on the margin, with both rewards pulled to plus and minus 1/2.

    loss:       -LS(tw - tl) + ((tw - 1/(2 beta))^2 + (tl + 1/(2 beta))^2) / 2
    incentives: d_w = S(tl - tw) + 1/(2 beta) - tw, d_l = S(tl - tw) + 1/(2 beta) + tl
    source:     Xiao et al. 2024, arXiv:2412.14516
    use:        in place of `dpo` where rewards should be of a set size and not only differ; the
                targets, 1/(2 beta) nats, outweigh the margin, and arXiv:2505.23761 found no setting
                that was reliable over several epochs

    Rewards are beta * t; beta does not enter the logistic term. The weight 1/2 of the squares and
    the default of beta are those of the authors' code; the paper's weight is 1 from memory, not
    checked.
    """

    name: ClassVar[str] = "cal_dpo"
    beta: float = number(1e-3, above=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        tw, tl = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        target = 0.5 / self.beta
        return -logsigmoid(tw - tl) + ((tw - target).square() + (tl + target).square()) / 2


@dataclass(frozen=True)
class NCAPair(LogRatioLoss):
    """Noise contrastive alignment of a pair: raises the chosen reward to a finite value.

    loss:       -LS(beta * tw) - (LS(-beta * tw) + LS(-beta * tl)) / 2
    incentives: d_w = beta * (S(-beta * tw) - S(beta * tw) / 2), d_l = beta / 2 * S(beta * tl)
    source:     Chen et al. 2024, arXiv:2402.05369
    use:        in place of `dpo` where the chosen response should not fall, since its reward has an
                optimum of its own; the rejected one falls without a bound

    Rewards are beta * t. The optimum of the chosen response is beta * tw = log 2.
    """

    name: ClassVar[str] = "nca_pair"
    beta: float = number(0.01, above=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


@dataclass(frozen=True)
class BCOPair(LogRatioLoss):
    """Binary classifier optimization of a pair: classifies each response on its own, about zero.

    loss:       -LS(beta * tw) - LS(-beta * tl)
    incentives: d_w = beta * S(-beta * tw), d_l = beta * S(beta * tl)
    source:     Jung et al. 2024, arXiv:2404.04656, without its reward shift
    use:        in place of `dpo` where each response should move in its own direction; zero divides
                the classes only while the rewards of both lie around it

    Rewards are beta * t. With beta = 1 this is `dil_bce`.
    """

    name: ClassVar[str] = "bco_pair"
    beta: float = number(0.01, above=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return -logsigmoid(chosen) - logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPOHard(LogRatioLoss):
    """Self-play preference optimization, hard labels: both rewards are regressed on plus/minus 1/2.

    loss:       (tw - 1/(2 beta))^2 + (tl + 1/(2 beta))^2
    incentives: d_w = 2 * (1/(2 beta) - tw), d_l = 2 * (1/(2 beta) + tl)
    source:     Wu et al. 2024, arXiv:2405.00675
    use:        in rounds on pairs that the policy of the last round, the reference, has sampled; on
                fixed data of others the targets, 1/(2 beta) nats, are far off and the squares
                follow outliers

    Rewards are beta * t; beta is 1 / eta of the paper. A soft label p moves the optimum to
    beta * tw = p - 1/2 = -beta * tl.
    """

    name: ClassVar[str] = "sppo_hard"
    beta: float = number(1e-3, above=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        tw, tl = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        target = 0.5 / self.beta
        return (tw - target).square() + (tl + target).square()


@dataclass(frozen=True)
class APOZero(LogRatioLoss):
    """Anchored preference optimization, zero: raises the chosen response, lowers the rejected one.

    loss:       1 - S(beta * tw) + S(beta * tl)
    incentives: d_w = beta * S'(beta * tw), d_l = beta * S'(beta * tl)
    source:     D'Oosterlinck et al. 2024, arXiv:2408.06266
    use:        where the chosen responses are better than the policy's own; both terms saturate, so
                responses far from the reference have next to no gradient, and a better policy is
                taught to be worse

    Rewards are beta * t. For a policy that is worse than the chosen responses. At beta = 1 this is
    the KTO of pairs of the Reward Calibration paper, S(-tw) + S(tl), Eq. 31 of arXiv:2604.18239
    with both weights 1: the loss that `kto_simple` has for the two responses.
    """

    name: ClassVar[str] = "apo_zero"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return 1 - chosen.sigmoid() + rejected.sigmoid()


@dataclass(frozen=True)
class APODown(LogRatioLoss):
    """Anchored preference optimization, down: lowers both responses, the rejected one further.

    loss:       S(beta * tw) + 1 - S(u), u = beta * (tw - tl)
    incentives: d_w = beta * (S'(u) - S'(beta * tw)), d_l = beta * S'(u)
    source:     D'Oosterlinck et al. 2024, arXiv:2408.06266
    use:        where the policy is better than the chosen responses and the pairs only say what is
                worse; for a weaker policy it unlearns good responses

    Rewards are beta * t. For a policy that is better than the chosen responses; d_w is negative
    where |u| > |beta * tw|.
    """

    name: ClassVar[str] = "apo_down"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


@dataclass(frozen=True)
class DensityRatioLoss(PairwiseLoss):
    """An objective that takes e^t for the ratio of two densities: its implicit reward is t."""

    needs_reference: ClassVar[bool] = True

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return logps - reference


@dataclass(frozen=True)
class DDRO(DensityRatioLoss):
    """Direct density ratio optimization: estimates the ratio of preferred to rejected responses.

    loss:       2 log 2 - tw - log(2 - e^tl)
    incentives: d_w = 1, d_l = e^tl / (2 - e^tl), at most 1999999
    source:     Higuchi and Suzuki 2025, arXiv:2505.07558
    use:        where preferences need not follow a model of pairwise choice; the pull on the chosen
                response never ends, that on the rejected one is huge near e^tl = 2, and one run
                of arXiv:2604.18239 broke down until it was calibrated

    Rewards are t. The logarithm ends at e^tl = 2; from 2 - 1e-6 it goes on as its tangent in tl.
    The authors' practical variant is not known here.
    """

    name: ClassVar[str] = "ddro"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        # log(2 - e^t) = log 2 + log(1 - e^(t - log 2)), which does not cancel near the end.
        below = log1mexp(rejected - math.log(2), math.log(DDRO_RATIO_LIMIT / 2))
        return math.log(2) - chosen - below


@dataclass(frozen=True)
class DILBCE(DensityRatioLoss):
    """Direct imitation learning, cross-entropy: classifies each response by its density ratio.

    loss:       -LS(tw) - LS(-tl)
    incentives: d_w = S(-tw), d_l = S(tl)
    source:     Xiao et al. 2025, arXiv:2503.05079
    use:        to imitate the chosen responses with bounded incentives and no hyperparameter; on
                sums of log-probs they saturate a few nats from the reference

    Rewards are t. The authors' code averages the log-probs over the tokens; this is the sum.
    """

    name: ClassVar[str] = "dil_bce"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return -logsigmoid(chosen) - logsigmoid(-rejected)


@dataclass(frozen=True)
class DILUKL(DensityRatioLoss):
    """Direct imitation learning, unnormalized KL: likelihood of chosen against the ratio of others.

    loss:       e^tl - tw
    incentives: d_w = 1, d_l = e^tl
    source:     Xiao et al. 2025, arXiv:2503.05079
    use:        where the likelihood of the chosen response matters most and the rejected one should
                not rise; the former is pulled without end as in `sft`, the latter less the lower it
                is

    Rewards are t. Where e^tl exceeds e^20 it goes on as its tangent, so d_l <= e^20. The authors'
    code averages the log-probs over the tokens; this is the sum.
    """

    name: ClassVar[str] = "dil_ukl"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return exp_linear(rejected) - chosen


@dataclass(frozen=True)
class DILLSIF(DensityRatioLoss):
    """Direct imitation learning, least squares: fits the density ratio by importance fitting.

    loss:       e^(2 tl) / 2 - e^tw
    incentives: d_w = e^tw, d_l = e^(2 tl)
    source:     Xiao et al. 2025, arXiv:2503.05079
    use:        in place of `dil_bce` where the pull should grow with a response's own ratio; what
                rises is pulled exponentially harder and the loss has no lower bound, so it wants a
                small learning rate

    Rewards are t. Where an exponential exceeds e^20 it goes on as its tangent, so both incentives
    are at most e^20. The authors' code averages the log-probs over the tokens; this is the sum.
    """

    name: ClassVar[str] = "dil_lsif"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return exp_linear(2 * rejected) / 2 - exp_linear(chosen)


@dataclass(frozen=True)
class PROP(LogRatioLoss):
    """Proximalized preference optimization of pairs: DPO plus a pull of both rewards to zero.

    loss:       (-LS(u) + K(beta * tw) + K(beta * tl)) / 4, u = beta * (tw - tl),
                K(x) = -(LS(x) + LS(-x)) / 2 - log 2
    incentives: d_w = beta/4 * (S(-u) + 1/2 - S(beta * tw)),
                d_l = beta/4 * (S(-u) - 1/2 + S(beta * tl))
    source:     Guo et al. 2025, arXiv:2505.23316
    use:        in place of `dpo` where both log-probs fall: rewards have a finite optimum of their
                own; it is close to zero, so beta alone says how far the policy moves

    Rewards are beta * t. K is the KL divergence of a coin of S(x) from a fair one. The optimum is
    finite, beta * tw = -beta * tl = 0.756; d_l is negative once the rejected reward is low enough.
    The prefactor is reconstructed, and the reward of all other responses is 0 as in the paper's
    experiments. Of the values of beta there, 0.1 is that of the figures of the dynamics.
    """

    name: ClassVar[str] = "pro_p"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        pull = -logsigmoid(chosen - rejected) + from_fair_coin(chosen) + from_fair_coin(rejected)
        return pull / 4


OBJECTIVES: tuple[type[PairwiseLoss], ...] = (
    DPOP,
    CalDPO,
    NCAPair,
    BCOPair,
    SPPOHard,
    APOZero,
    APODown,
    DDRO,
    DILBCE,
    DILUKL,
    DILLSIF,
    PROP,
)
