"""Objectives on the margin of two log-ratios: one number per pair, the same pull on both responses.

They need a reference and sum over tokens. Notation and soft labels: see `base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastpref.logps import SequenceLogps
from fastpref.losses.base import LogRatioLoss, PairwiseLoss, choice, number
from fastpref.losses.numerics import exp_linear
from fastpref.utils.lazy_torch import Tensor, logsigmoid


@dataclass(frozen=True)
class DPO(LogRatioLoss):
    """Direct preference optimization: logistic loss on the margin of the implicit rewards.

    loss:       -LS(u), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * S(-u)
    source:     Rafailov et al. 2023, Eq. 7, arXiv:2305.18290
    use:        the first choice for pairs with a clear winner; with hard labels its margin has no
                finite optimum, and the log-probs of both responses often fall together

    Rewards are beta * t. A soft label p moves the optimum from infinity to u = logit(p).
    """

    name: ClassVar[str] = "dpo"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return -logsigmoid(self.margin(policy, reference))


@dataclass(frozen=True)
class CDPO(LogRatioLoss):
    """Conservative DPO: DPO that expects a share of the labels to be flipped.

    loss:       -(1 - e) * LS(u) - e * LS(-u), u = beta * (tw - tl), e = label_smoothing
    incentives: d_w = d_l = beta * (1 - e - S(u))
    source:     Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3 (no arXiv id)
    use:        in place of `dpo` where a share of the labels is thought to be wrong or the policy
                grows too sure; a share that is guessed too high holds back clean pairs as well

    Rewards are beta * t. The optimum is u = logit(1 - e); with a soft label p as well, the flips
    come on top of it and the optimum is u = logit(p * (1 - e) + (1 - p) * e). The note names no
    default for e; 0.2 is that of the HALOs library.
    """

    name: ClassVar[str] = "cdpo"
    label_smoothing: float = number(0.2, at_least=0, below=0.5)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        return -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)


@dataclass(frozen=True)
class Robust(LogRatioLoss):
    """Robust DPO: an unbiased estimate of the DPO loss when a known share of labels is flipped.

    loss:       (-(1 - e) * LS(u) + e * LS(-u)) / (1 - 2 e), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * ((1 - e) * S(-u) + e * S(u)) / (1 - 2 e)
    source:     Chowdhury et al. 2024, arXiv:2403.00409
    use:        in place of `cdpo` where flips are random and their rate is known, since it undoes
                their bias; it never stops pushing, so a wrong rate or a long run does harm

    e is label_smoothing, rewards are beta * t. The loss has no lower bound: its incentives lie
    between beta * e / (1 - 2 e) and beta * (1 - e) / (1 - 2 e) and never vanish.
    """

    name: ClassVar[str] = "robust"
    label_smoothing: float = number(0.1, at_least=0, below=0.5)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u, e = self.margin(policy, reference), self.label_smoothing
        return (e * logsigmoid(-u) - (1 - e) * logsigmoid(u)) / (1 - 2 * e)


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """Identity preference optimization: a squared loss that pulls the log-ratio margin to a target.

    loss:       (tw - tl - 1/(2 tau))^2
    incentives: d_w = d_l = 2 * (1/(2 tau) - (tw - tl)), negative beyond the target
    source:     Azar et al. 2023, Eq. 17, arXiv:2310.12036
    use:        in place of `dpo` where labels are nearly certain and the policy should stay close
                to its reference; one target in nats for short and long responses alike needs a tau
                that fits the lengths

    Rewards are tau * t. A soft label p moves the optimum to tw - tl = (p - 1/2) / tau. This is the
    paper's form, on summed log-probs; `ipo_avg` is that of TRL and HALOs.
    """

    name: ClassVar[str] = "ipo"
    needs_reference: ClassVar[bool] = True
    tau: float = number(0.1, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.tau * (logps - reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return ((self.margin(policy, reference) - 0.5) / self.tau).square()


@dataclass(frozen=True)
class Hinge(LogRatioLoss):
    """Hinge loss: pushes the margin of the implicit rewards up to 1 and no further.

    loss:       max(0, 1 - u), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * [u < 1]
    source:     Liu et al. 2023, arXiv:2309.06657, after SLiC, arXiv:2305.10425
    use:        in place of `dpo` where a pair that has its margin should train no more; all others
                pull with full strength, wrong labels among them

    Rewards are beta * t.
    """

    name: ClassVar[str] = "hinge"

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return (1 - self.margin(policy, reference)).relu()


@dataclass(frozen=True)
class EXOPair(LogRatioLoss):
    """Efficient exact optimization: reverse KL from the label to the policy's own preference.

    loss:       S(u) * (LS(u) - log(1 - e)) + S(-u) * (LS(-u) - log(e)), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * S'(u) * (logit(1 - e) - u)
    source:     Ji et al. 2024, arXiv:2402.00856
    use:        in place of `dpo` from a start that orders most pairs rightly, to settle at a finite
                margin; pairs ordered very wrongly have next to no gradient and stay as they are

    e is label_smoothing, rewards are beta * t. The incentives vanish on both sides, so a pair that
    is ordered very wrongly is left alone. The optimum is u = logit(1 - e), with a soft label p
    (2 p - 1) * logit(1 - e). The authors' code has -10 for log(e) and 0 for log(1 - e).
    """

    name: ClassVar[str] = "exo_pair"
    label_smoothing: float = number(1e-3, above=0, below=0.5)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u, e = self.margin(policy, reference), self.label_smoothing
        chosen = u.sigmoid() * (logsigmoid(u) - math.log1p(-e))
        return chosen + (-u).sigmoid() * (logsigmoid(-u) - math.log(e))


@dataclass(frozen=True)
class DiscoPOP(LogRatioLoss):
    """Discovered preference optimization: logistic and exponential loss, blended by the margin.

    loss:       -(1 - q) * LS(u) + q * e^-u, q = S(u / tau), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * ((1 - q) * S(-u) + q * e^-u - q * (1 - q) / tau * (e^-u + LS(u)))
    source:     Lu et al. 2024, arXiv:2406.08414
    use:        beside `dpo` on an evaluation of your own, being found by search and not derived;
                the loss is not monotone in the margin, and beta and tau are coupled

    Rewards are beta * t. In a narrow band of u the incentives are negative. For tau > 1 the term
    q * e^-u has no bound; it goes on as its tangent where it exceeds e^20.
    """

    name: ClassVar[str] = "discopop"
    beta: float = number(0.05, above=0)
    tau: float = number(0.05, above=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        exponential = exp_linear(logsigmoid(u / self.tau) - u)  # q alone underflows, e^-u overflows
        return exponential - (-u / self.tau).sigmoid() * logsigmoid(u)


@dataclass(frozen=True)
class RDPO(LogRatioLoss):
    """Length-regularized DPO: DPO that asks a larger margin of a chosen response that is shorter.

    loss:       -LS(u + alpha * (nw - nl)), u = beta * (tw - tl)
    incentives: d_w = d_l = beta * S(-u - alpha * (nw - nl))
    source:     Park et al. 2024, arXiv:2403.19159
    use:        in place of `dpo` where the policy has learnt that longer is better; too large an
                alpha trains on lengths and no longer on preferences

    Rewards are beta * t, without the length. The defaults are from memory of the paper's range
    (alpha 0.05 to 1, beta 0.01 to 0.1), not checked.
    """

    name: ClassVar[str] = "r_dpo"
    alpha: float = number(0.05, at_least=0)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        longer = (policy.chosen_lengths - policy.rejected_lengths).to(u.dtype)
        return -logsigmoid(u + self.alpha * longer)


@dataclass(frozen=True)
class PMO(PairwiseLoss):
    """Preference matching optimization: DPO with an entropy bonus, a weaker pull to the reference.

    loss:       -LS(u), u = (alpha + beta) * (zw - zl) - beta * (rw - rl)
    incentives: d_w = d_l = (alpha + beta) * S(-u)
    source:     "A fine-grained analysis of pure semantic preference alignment in LLMs", Eq. 5
                (anonymous submission, no arXiv id)
    use:        where the policy's odds should match the labels' probabilities, with alpha + beta
                near 1, and not merely order the pairs; that can cost accuracy, and with small alpha
                and beta it grows as sure as `dpo`

    Rewards are (alpha + beta) * z - beta * r. alpha = 0 is DPO; beta = 0 needs no reference and is
    `logpi_dpo`. The defaults are the paper's for pure semantic preferences; on benchmarks it uses
    0.05 for both.
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
class HDPO(DPO):
    """H-DPO: DPO with the entropy of the policy weighed by alpha; alpha < 1 sharpens the policy.

    loss:       -LS(u), u = beta * (alpha * (zw - zl) - (rw - rl))
    incentives: d_w = d_l = alpha * beta * S(-u)
    source:     Omura et al. 2024, arXiv:2411.07595
    use:        in place of `dpo` to set the entropy of the policy, sharper for alpha < 1, wider for
                alpha > 1; a sharper policy has less variety to sample from

    Rewards are beta * (alpha * z - r). alpha = 1 is DPO, and alpha = (a + b) / b with beta = b is
    PMO(a, b). The default of alpha is from memory of the paper's range, 0.8 to 1.2, not checked.
    """

    name: ClassVar[str] = "h_dpo"
    alpha: float = number(0.9, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        # z - r first: next to alpha * z, of thousands of nats, fp32 would round it away.
        return self.beta * ((self.alpha - 1) * logps + (logps - reference))


@dataclass(frozen=True)
class BPO(LogRatioLoss):
    """Bregman preference optimization: matches the ratio of preference probabilities, R = e^-u.

    loss:       R^(lam + 1) / (s * (lam + 1)) - R^-lam / (s * lam), (R + log R) / s for lam = 0;
                R = e^-u, u = beta * (tw - tl), s = scale
    incentives: d_w = d_l = beta / s * (e^(-(lam + 1) * u) + e^(lam * u)), 0 where R < clip_low
    source:     Kim et al. 2025, scaled Basu's power divergence and Code 1, arXiv:2505.19601
    use:        in place of `dpo` to choose how hard easy and misordered pairs pull; beta, lam and
                the clip are coupled, and powers of the ratio make misordered pairs dominate

    Rewards are beta * t. R is clipped from below, without a gradient; powers of it beyond e^20 go
    on as their tangents. The defaults are the paper's for HH; for TL;DR it has beta 0.5, lam -0.5,
    clip_low 0.025. lam = 0, scale = 1 is the paper's KLIEP, lam = 1, scale = 0.5 its LSIF, and its
    logistic divergence is DPO. Losses blended with DPO or SimPO are left out.
    """

    name: ClassVar[str] = "bpo"
    lam: float = number(1.2, above=-1)
    scale: float = number(4.0, above=0)
    clip_low: float = number(0.01, at_least=0, below=1)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        u = self.margin(policy, reference)
        if self.clip_low:
            u = u.clamp(max=-math.log(self.clip_low))
        power = exp_linear(-(self.lam + 1) * u) / (self.lam + 1)
        inverse = -exp_linear(self.lam * u) / self.lam if self.lam else -u
        return (power + inverse) / self.scale


@dataclass(frozen=True)
class FDPO(DPO):
    """f-DPO: DPO regularized by another divergence than the reverse KL.

    loss:       -LS(u), u = beta * (g(tw) - g(tl)); g(t) is t for reverse_kl, 1 - e^-t for
                forward_kl, log 2 + LS(t) for js, (e^((alpha - 1) * t) - 1) / (alpha - 1) for alpha
    incentives: d_w = beta * S(-u) * g'(tw), d_l = beta * S(-u) * g'(tl); g'(t) is 1, e^-t, S(-t),
                e^((alpha - 1) * t)
    source:     Wang et al. 2023, arXiv:2309.16240
    use:        in place of `dpo` where the reverse KL costs too much variety; the two responses
                then pull unequally, under forward_kl exponentially hard where one falls below its
                reference

    Rewards are beta * g(t). reverse_kl is DPO. Exponentials beyond e^20 go on as their tangents,
    so g' is at most e^20. `alpha` belongs to the alpha divergence alone.
    """

    name: ClassVar[str] = "f_dpo"
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = choice(
        "reverse_kl", "forward_kl", "js", "alpha"
    )
    alpha: float = number(0.5, above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "alpha" and self.alpha != 0.5:
            raise ValueError(
                f"alpha: {self.divergence} has none; leave it out or set divergence: alpha"
            )

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * self._link(logps - reference)

    def _link(self, t: Tensor) -> Tensor:
        """g(t), which is 0 where the policy agrees with the reference."""
        if self.divergence == "forward_kl":
            return 1 - exp_linear(-t)
        if self.divergence == "js":
            return math.log(2) + logsigmoid(t)
        if self.divergence == "alpha":
            return (exp_linear((self.alpha - 1) * t) - 1) / (self.alpha - 1)
        return t


@dataclass(frozen=True)
class ChiPO(DPO):
    """chi-squared preference optimization: DPO that resists over-optimization by a steeper link.

    loss:       -LS(v), v = u within [-2 r_max, 2 r_max], u = beta * (g(tw) - g(tl)), g(t) = e^t + t
    incentives: d_w = beta * S(-v) * (e^tw + 1), d_l = beta * S(-v) * (e^tl + 1), 0 where clipped
    source:     Huang et al. 2024, arXiv:2407.13399
    use:        in place of `dpo` where the pairs cover the policy's responses poorly and it
                over-optimizes; responses that rise above their reference pull exponentially hard,
                and clipped pairs not at all

    Rewards are beta * g(t), beta at the reference. e^t beyond e^20 goes on as its tangent; that
    others hold t within [-88, 20] instead is from memory, not checked. The default of r_max is a
    choice made here; it clips hardly anything.
    """

    name: ClassVar[str] = "chi_po"
    beta: float = number(0.05, above=0)
    r_max: float = number(10.0, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        t = logps - reference
        return self.beta * (exp_linear(t) + t)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        bound = 2 * self.r_max
        return -logsigmoid(self.margin(policy, reference).clamp(-bound, bound))


OBJECTIVES: tuple[type[PairwiseLoss], ...] = (
    DPO,
    CDPO,
    Robust,
    IPO,
    Hinge,
    EXOPair,
    DiscoPOP,
    RDPO,
    PMO,
    HDPO,
    BPO,
    FDPO,
    ChiPO,
)
