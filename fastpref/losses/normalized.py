"""Objectives on log-probs per token or without a reference, and the likelihood itself.

Notation, soft labels and empty responses: see `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastpref.logps import SequenceLogps, mean_logps
from fastpref.losses.base import PairwiseLoss, choice, number
from fastpref.losses.margin import DPO, IPO
from fastpref.losses.numerics import exp_linear, log1mexp
from fastpref.utils.lazy_torch import Tensor, logsigmoid

ODDS_LIMIT = -1e-6  # the log-prob per token from which the odds of ORPO are continued


@dataclass(frozen=True)
class LogPiDPO(DPO):
    """DPO with the reference set to zero: the implicit reward is the log-prob itself.

    loss:       -LS(u), u = beta * (zw - zl)
    incentives: d_w = d_l = beta * S(-u)
    source:     Rafailov et al. 2023, arXiv:2305.18290, without its reference, as in "Differential
                information", arXiv:2505.23761
    use:        to learn the distribution by whose odds the pairs were chosen, as in the experiments
                on differential information, or `dpo` without a reference; nothing holds the policy
                to where it started, and on sums the shorter response starts ahead

    Rewards are beta * z. This is PMO(beta, 0), and `cpo` with lam = 0. Where chosen responses are
    drawn from one distribution and rejected ones from another, the optimum at beta = 1 is their
    ratio, normalized. The default of beta is that of `dpo`.
    """

    name: ClassVar[str] = "logpi_dpo"
    needs_reference: ClassVar[bool] = False  # then the reference that `reward` sees is zero


@dataclass(frozen=True)
class IPOAvg(IPO):
    """IPO per token: a squared loss that pulls the margin of the mean log-ratios to a target.

    loss:       (tw/nw - tl/nl - 1/(2 tau))^2
    incentives: d_w = c/nw, d_l = c/nl, c = 2 * (1/(2 tau) - (tw/nw - tl/nl))
    source:     Azar et al. 2023, arXiv:2310.12036, averaged as in TRL and HALOs
    use:        in place of `ipo` where lengths differ much; the target is per token, 5 nats of it
                at tau 0.1, so a tau that suits one of the two does not suit the other

    Rewards are tau * t / n. TRL reports that the authors averaged in their experiments; the paper
    has sums, which is `ipo`.
    """

    name: ClassVar[str] = "ipo_avg"

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.tau * mean_logps(logps - reference, lengths)


@dataclass(frozen=True)
class DPONorm(DPO):
    """Length-normalized DPO: logistic loss on the margin of the mean log-ratios.

    loss:       -LS(u), u = beta * (tw/nw - tl/nl)
    incentives: d_w = beta/nw * S(-u), d_l = beta/nl * S(-u)
    source:     Lambert et al. 2024 (Tulu 3), arXiv:2411.15124
    use:        in place of `dpo` where long responses dominate the margin; beta has to be larger by
                about the length of a response

    Rewards are beta * t / n. The default of beta is from memory of that paper, not checked.
    """

    name: ClassVar[str] = "dpo_norm"
    beta: float = number(5.0, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * mean_logps(logps - reference, lengths)


@dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """Simple preference optimization: length-normalized, reference-free, with a target margin.

    loss:       -LS(u - gamma), u = beta * (aw - al)
    incentives: d_w = beta/nw * S(gamma - u), d_l = beta/nl * S(gamma - u)
    source:     Meng et al. 2024, Eq. 6, arXiv:2405.14734
    use:        where there is no memory for a reference or length is a confound; beta, gamma and
                the learning rate are tuned for each model, and with more epochs nothing stops the
                margin, and the text can degenerate

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
class SLiCHF(PairwiseLoss):
    """Sequence likelihood calibration: hinge loss on the log-prob margin plus likelihood of chosen.

    loss:       max(0, delta - (zw - zl)) - lam * zw
    incentives: d_w = [zw - zl < delta] + lam, d_l = [zw - zl < delta]
    source:     Zhao et al. 2023, arXiv:2305.10425
    use:        without a reference, where a margin is enough and the likelihood term keeps the
                chosen response up; a margin of the sums is easier to reach the longer the responses

    Rewards are z. The paper takes the likelihood of a fine-tuning target, which preference data
    lack; as in HALOs, whose defaults these are, the chosen response stands in for it. With
    delta = 0 this is `rrhf` with `average: false`.
    """

    name: ClassVar[str] = "slic_hf"
    needs_reference: ClassVar[bool] = False
    delta: float = number(1.0, at_least=0)
    lam: float = number(0.1, at_least=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return logps

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        hinge = (self.delta - self.margin(policy, reference)).relu()
        return hinge - self.lam * policy.chosen


@dataclass(frozen=True)
class RRHF(PairwiseLoss):
    """Rank responses to align: ranking loss on mean log-probs plus likelihood of chosen.

    loss:       max(0, al - aw) - lam * zw; z in place of a if not average
    incentives: d_w = [aw < al]/nw + lam, d_l = [aw < al]/nl; n = 1 and z for a if not average
    source:     Yuan et al. 2023, arXiv:2304.05302; of sums: arXiv:2604.18239, Eq. 22
    use:        where the chosen responses are good targets and the ranking is a correction; the
                likelihood is summed and the ranking averaged, so at lam 1 this is nearly `sft`

    Rewards are the log-probs that are ranked, a or z. The RRHF paper ranks means, `average: true`;
    the Reward Calibration paper, arXiv:2604.18239, gives the name to the ranking of sums,
    `average: false`, which is `slic_hf` with delta = 0. The likelihood is a sum in both. The
    authors' code weighs the ranking by 100 against a likelihood that is a mean over tokens, which
    amounts to lam = 0.01 / nw.
    """

    name: ClassVar[str] = "rrhf"
    needs_reference: ClassVar[bool] = False
    lam: float = number(1.0, at_least=0)
    average: bool = choice(True, False)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return mean_logps(logps, lengths) if self.average else logps

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return (-self.margin(policy, reference)).relu() - self.lam * policy.chosen


@dataclass(frozen=True)
class CPO(PairwiseLoss):
    """Contrastive preference optimization: reference-free logistic loss plus likelihood of chosen.

    loss:       -LS(u) - lam * zw, u = beta * (zw - zl)
    incentives: d_w = beta * S(-u) + lam, d_l = beta * S(-u)
    source:     Xu et al. 2024, arXiv:2401.08417
    use:        without a reference, where the chosen responses are worth imitating; the summed
                likelihood outweighs the contrast at lam 1, and both log-probs may rise

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
class CPOSimPO(SimPO):
    """CPO-SimPO: SimPO plus the mean log-likelihood of the chosen response.

    loss:       -LS(u - gamma) - lam * aw, u = beta * (aw - al)
    incentives: d_w = (beta * S(gamma - u) + lam)/nw, d_l = beta/nl * S(gamma - u)
    source:     SimPO, arXiv:2405.14734, with the likelihood term of CPO, arXiv:2401.08417
    use:        in place of `simpo` where the chosen response falls; at the defaults the likelihood
                outweighs the contrast, so that it imitates chosen responses of any quality

    Rewards are beta * a. The defaults are those of TRL's CPO trainer for this loss.
    """

    name: ClassVar[str] = "cpo_simpo"
    beta: float = number(0.1, above=0)
    gamma: float = number(0.5)
    lam: float = number(1.0, at_least=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        likelihood = mean_logps(policy.chosen, policy.chosen_lengths)
        return super().hard_loss(policy, reference) - self.lam * likelihood


@dataclass(frozen=True)
class ORPO(PairwiseLoss):
    """Odds ratio preference optimization: likelihood of chosen plus logistic loss on the odds.

    loss:       -aw - lam * LS(o), o = h(aw) - h(al), h(a) = a - log(1 - e^a)
    incentives: d_w = (1 + lam * S(-o) / (1 - e^aw))/nw, d_l = lam * S(-o) / (1 - e^al) / nl
    source:     Hong et al. 2024, arXiv:2403.07691
    use:        to train from a base model in one stage, without SFT before it and without a
                reference; the contrast is weak beside the likelihood, so the chosen responses must
                be good targets

    Rewards are a. The log-odds h have a pole at a = 0, certain tokens; above a = -1e-6 they go on
    as their tangent, so 1 / (1 - e^a) is at most about 1e6.
    """

    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False
    lam: float = number(0.1, at_least=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return mean_logps(logps, lengths)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        odds = chosen - rejected - log1mexp(chosen, ODDS_LIMIT) + log1mexp(rejected, ODDS_LIMIT)
        return -chosen - self.lam * logsigmoid(odds)


@dataclass(frozen=True)
class SimPER(PairwiseLoss):
    """Simple alignment with perplexity: raises the inverse perplexity of chosen above rejected.

    loss:       e^al - e^aw
    incentives: d_w = e^aw/nw, d_l = e^al/nl
    source:     Xiao et al. 2025, arXiv:2502.00883
    use:        as a first baseline, having nothing to tune but the learning rate; responses of low
                likelihood have next to no gradient, and longer training can still degrade the
                policy

    Rewards are a. There are no hyperparameters. Log-probs are negative; were a above 20, e^a would
    go on as its tangent.
    """

    name: ClassVar[str] = "simper"
    needs_reference: ClassVar[bool] = False

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return mean_logps(logps, lengths)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return exp_linear(rejected) - exp_linear(chosen)


@dataclass(frozen=True)
class StaPO(PairwiseLoss):
    """Stable preference optimization: keeps the margin per token between two bounds.

    loss:       -LS(beta * (Z - left)) - LS(beta * (right - Z)), Z = aw - al
    incentives: d_w = E/nw, d_l = E/nl, E = beta * (S(-beta * (Z - left)) - S(beta * (Z - right)))
    source:     "Stable preference optimization via two-sided contrastive learning", Eq. 7
                (anonymous submission, no arXiv id)
    use:        in place of `simpo` for more epochs, since the margin stays between two bounds; the
                bounds are tuned for each model, and a pair beyond them is pulled back though it is
                ordered rightly

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


@dataclass(frozen=True)
class StaPORef(StaPO):
    """StaPO with a reference: keeps the log-ratio margin of the whole responses between two bounds.

    loss:       -LS(beta * (Z - left)) - LS(beta * (right - Z)), Z = tw - tl
    incentives: d_w = d_l = beta * (S(-beta * (Z - left)) - S(beta * (Z - right)))
    source:     as `stapo`, with the Z of DPO
    use:        as `stapo`, where a reference should hold the policy; its bounds have no source and
                need tuning to the lengths of the responses

    Rewards are beta * t. Reconstructed: the paper states neither beta nor the margins of this form.
    Here beta is that of DPO, and the margins are those of `stapo` as margins of the reward, 1.2 and
    1.6, divided by it.
    """

    name: ClassVar[str] = "stapo_ref"
    needs_reference: ClassVar[bool] = True
    beta: float = number(0.1, above=0)
    left_margin: float = number(12.0)
    right_margin: float = number(16.0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * (logps - reference)


@dataclass(frozen=True)
class SFT(PairwiseLoss):
    """Supervised fine-tuning: negative log-likelihood of the chosen response, or of both.

    loss:       -aw, or -(aw + al) / 2 for responses="both"; z in place of a if not average
    incentives: d_w = 1/nw, d_l = 0; for both: d_w = 1/(2 nw), d_l = -1/(2 nl); n = 1 for sums
    source:     maximum likelihood
    use:        before preference training, as a baseline, or as a part of a weighted sum; it takes
                no notice of rejected responses, and with "both" imitates them as well

    The average is over the tokens of each response, so every response weighs the same whatever
    its length. Rewards are the log-probs that enter the loss, a or z. With "both" the label does
    not matter, be it hard or soft. In a config, `loss: sft` also takes rows with one response,
    which `data.sft_on` describes.
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


OBJECTIVES: tuple[type[PairwiseLoss], ...] = (
    LogPiDPO,
    IPOAvg,
    DPONorm,
    SimPO,
    SLiCHF,
    RRHF,
    CPO,
    CPOSimPO,
    ORPO,
    SimPER,
    StaPO,
    StaPORef,
    SFT,
)
