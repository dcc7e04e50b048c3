"""Objectives on single responses, each labeled desirable or not.

They need a reference and sum over tokens. Notation of the docstrings: z, r are the summed log-probs
of a response under the policy and the reference, t = z - r, and d = -dL/dz is its incentive;
y is 1 for a desirable response and -1 for another one; w is desirable_weight for the former and
undesirable_weight for the latter. S is the logistic function, S' its derivative S(x) * S(-x), LS
its logarithm, and K(x) = -(LS(x) + LS(-x)) / 2 - log 2.

Two objectives compare the rewards with a reference point that is common to all responses and
estimated from many of them. Results of `sum_and_count` add up over micro-batches and ranks;
`pooled_mean` and `RunningMean` turn them into the point.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fastpref.logps import UnpairedLogps
from fastpref.losses.base import Kind, Loss, number
from fastpref.losses.numerics import DDRO_RATIO_LIMIT, from_fair_coin, log1mexp
from fastpref.utils.lazy_torch import Tensor, logsigmoid, torch


@dataclass(frozen=True, eq=False)
class PointwiseOutput:
    """Per-response results, each (S,) and never reduced; the rewards carry no gradient."""

    loss: Tensor
    rewards: Tensor
    classifies: bool = True  # whether the sign of a reward says what the label is


@dataclass(frozen=True)
class PointwiseLoss(Loss):
    """An objective on single responses, which writes `reward` and `response_loss`.

    An empty response adds nothing: its loss, its reward and its incentive are 0.
    """

    kind: ClassVar[Kind] = "pointwise"
    needs_reference: ClassVar[bool] = True
    needs_reference_point: ClassVar[bool] = False

    @abstractmethod
    def reward(self, log_ratios: Tensor) -> Tensor:
        """The implicit reward of each response: log-ratios t, (S,) -> (S,)."""

    @abstractmethod
    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        """The loss (S,) of responses that are not empty; `reference_point` is () and constant."""

    def __call__(
        self,
        policy: UnpairedLogps,
        reference: UnpairedLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> PointwiseOutput:
        """Loss and reward of each response.

        The reference and the reference point, a tensor (), are constants: no gradient reaches
        them. Raises ValueError when the reference or a needed point is missing or has another
        shape than it must, and for a point that the objective does not need.
        """
        self.check(policy, reference, reference_point)
        assert reference is not None
        scored = policy.lengths > 0
        log_ratios = torch.where(scored, policy.logps - reference.logps.detach(), 0.0)
        point = log_ratios.new_zeros(())
        if reference_point is not None:
            point = reference_point.detach().to(log_ratios)
        loss = torch.where(scored, self.response_loss(log_ratios, policy, point), 0.0)
        return PointwiseOutput(loss, self.reward(log_ratios.detach()))

    def check(
        self,
        policy: UnpairedLogps,
        reference: UnpairedLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        """Raise ValueError for arguments that `__call__` refuses."""
        if reference is None:
            raise ValueError(
                f"reference: {self.name} needs the log-probs of a reference policy, got None; "
                f"set `reference: cached`"
            )
        if reference.logps.shape != policy.logps.shape:
            raise ValueError(
                f"reference: expected {policy.logps.numel()} responses as in the policy, got shape "
                f"{tuple(reference.logps.shape)}; pass the same batch to both models"
            )
        if not self.needs_reference_point:
            self.refuse_reference_point(reference_point)
            return
        if reference_point is None:
            raise ValueError(
                f"reference_point: {self.name} needs one, got None; pass a tensor () as its "
                f"documentation says"
            )
        if reference_point.dim() != 0:
            raise ValueError(
                f"reference_point: expected shape (), one for all responses, "
                f"got {tuple(reference_point.shape)}"
            )


@dataclass(frozen=True)
class LogRatioPointwiseLoss(PointwiseLoss):
    """A pointwise objective whose implicit reward is beta * t, zero where policy = reference."""

    beta: float = number(0.1, above=0)

    def reward(self, log_ratios: Tensor) -> Tensor:
        return self.beta * log_ratios


@dataclass(frozen=True)
class DensityRatioPointwiseLoss(PointwiseLoss):
    """A pointwise objective without beta: its implicit reward is t."""

    def reward(self, log_ratios: Tensor) -> Tensor:
        return log_ratios


@dataclass(frozen=True)
class KTO(LogRatioPointwiseLoss):
    """Kahneman-Tversky optimization: a value of the reward that saturates for gains and losses.

    loss:       w * (1 - S(y * beta * (t - z0))), z0 = max(0, reference_point)
    incentives: d = w * y * beta * S'(beta * (t - z0))
    source:     Ethayarajh et al. 2024, arXiv:2402.01306
    use:        for responses labeled one by one, also in uneven numbers, where pairs are missing;
                the value saturates on both sides, so responses that have drifted far stop training,
                and the point costs another forward pass

    Rewards are beta * t. The reference point, in nats, is the mean t of mismatched responses, which
    are those of other prompts: an estimate of the KL divergence from the reference. TRL advises
    weights that hold w * (number of responses) of the two classes between 1:1 and 4:3. The Reward
    Calibration paper calls another loss KTO, without a point: `kto_simple`, on pairs `apo_zero`
    with beta = 1.
    """

    name: ClassVar[str] = "kto"
    needs_reference_point: ClassVar[bool] = True
    desirable_weight: float = number(1.0, above=0)
    undesirable_weight: float = number(1.0, above=0)

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        shifted = self.beta * (log_ratios - reference_point.clamp(min=0))
        weight = _by_label(policy, self.desirable_weight, self.undesirable_weight)
        return weight * (-_signed(shifted, policy)).sigmoid()


@dataclass(frozen=True)
class KTOSimple(DensityRatioPointwiseLoss):
    """Simplified KTO: beta = 1 and a reference point of zero.

    loss:       w * S(-y * t)
    incentives: d = w * y * S'(t)
    source:     "Towards disentangled preference optimization dynamics", arXiv:2604.18239
    use:        to repeat the comparison it comes from, or as `kto` without the cost of its point;
                its incentives vanish a few nats from the reference

    Rewards are t. A response whose probability has changed by more than a few nats is left alone.
    The code released with the paper has a `dpo` under the name of KTO.
    """

    name: ClassVar[str] = "kto_simple"
    desirable_weight: float = number(1.0, above=0)
    undesirable_weight: float = number(1.0, above=0)

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        weight = _by_label(policy, self.desirable_weight, self.undesirable_weight)
        return weight * (-_signed(log_ratios, policy)).sigmoid()


@dataclass(frozen=True)
class BCO(LogRatioPointwiseLoss):
    """Binary classifier optimization: classifies each response by its reward, about a moving point.

    loss:       -LS(y * (beta * t - delta)), delta = reference_point
    incentives: d = y * beta * S(-y * (beta * t - delta))
    source:     Jung et al. 2024, arXiv:2404.04656
    use:        in place of `kto` where responses on the wrong side should keep their gradient;
                without the paper's weights, classes whose prompts differ can be separated by that

    Rewards are beta * t. delta is the mean of all rewards seen so far (`RunningMean`); that of TRL
    takes in those of the batch at hand first, that of this project's trainer after the step. The
    paper's optional weights of undesirable responses, by how far they lie from the desirable ones,
    are left out. The default of beta is that of `bco_pair`.
    """

    name: ClassVar[str] = "bco"
    needs_reference_point: ClassVar[bool] = True
    beta: float = number(0.01, above=0)

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        return -logsigmoid(_signed(self.reward(log_ratios) - reference_point, policy))


@dataclass(frozen=True)
class DDROUnpaired(DensityRatioPointwiseLoss):
    """Direct density ratio optimization of single responses: estimates desirable to undesirable.

    loss:       log 2 - t if desirable, log 2 - log(2 - e^t) if not
    incentives: d = 1 if desirable, -e^t / (2 - e^t) if not, at least -1999999
    source:     Higuchi and Suzuki 2025, arXiv:2505.07558
    use:        as `ddro` for responses labeled one by one; desirable ones are pulled without end,
                and undesirable ones enormously near e^t = 2

    Rewards are t. The logarithm ends at e^t = 2; from 2 - 1e-6 it goes on as its tangent in t.
    The authors' practical variant is not known here.
    """

    name: ClassVar[str] = "ddro_unpaired"

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        # log(2 - e^t) = log 2 + log(1 - e^(t - log 2)), which does not cancel near the end.
        below = log1mexp(log_ratios - math.log(2), math.log(DDRO_RATIO_LIMIT / 2))
        return torch.where(policy.desirable, math.log(2) - log_ratios, -below)


@dataclass(frozen=True)
class PROB(LogRatioPointwiseLoss):
    """Proximalized preference optimization of binary labels: likelihood with a pull to reward zero.

    loss:       w * (-beta * y/2 * z + alpha * K(beta * t))
    incentives: d = w * beta * (y/2 - alpha * (S(beta * t) - 1/2))
    source:     Guo et al. 2025, arXiv:2505.23316
    use:        in place of `kto` where one class is rare or likelihoods fall, having a finite
                optimum; alpha and beta both need tuning, and with few desirable responses a small
                alpha over-optimizes

    Rewards are beta * t. K is the KL divergence of a coin of S(x) from a fair one. The optimum is
    beta * t = logit(1/2 + y / (2 alpha)), finite only for alpha > 1. The bracket is reconstructed:
    beta stands before the likelihood alone, since before both terms there is no optimum. The reward
    of all other responses is 0, as in the paper's experiments, whose alpha and best beta on
    Anthropic-HH are the defaults. With rare labels of one class, raise the weight of that class.
    """

    name: ClassVar[str] = "pro_b"
    beta: float = number(0.003, above=0)
    alpha: float = number(2.5)
    desirable_weight: float = number(1.0, above=0)
    undesirable_weight: float = number(1.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 1:
            raise ValueError(
                f"alpha: must be > 1, got {self.alpha}; the pull to the reference is then no "
                f"stronger than the label and the loss has no finite optimum"
            )

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        likelihood = -self.beta / 2 * _signed(policy.logps, policy)
        pull = self.alpha * from_fair_coin(self.reward(log_ratios))
        weight = _by_label(policy, self.desirable_weight, self.undesirable_weight)
        return weight * (likelihood + pull)


def _signed(values: Tensor, policy: UnpairedLogps) -> Tensor:
    """y * values, (S,) -> (S,)."""
    return torch.where(policy.desirable, values, -values)


def _by_label(policy: UnpairedLogps, desirable: float, undesirable: float) -> Tensor:
    """One of two numbers for each response, (S,)."""
    ones = torch.ones_like(policy.logps)
    return torch.where(policy.desirable, desirable * ones, undesirable * ones)


def pointwise_incentives(
    objective: PointwiseLoss,
    policy: UnpairedLogps,
    reference: UnpairedLogps | None = None,
    reference_point: Tensor | None = None,
) -> Tensor:
    """The scalar by which an objective scales the score of each response, (S,), by autograd.

    d = -dL/dz, so that -grad L = d * s with s the gradient of the response's log-prob.
    """
    with torch.enable_grad():
        logps = policy.logps.detach().requires_grad_()
        loss = objective(replace(policy, logps=logps), reference, reference_point).loss
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return -gradient


def sum_and_count(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the values (S,) of responses that are not empty, and their number: (2,) float64.

    The results of micro-batches and of ranks add up to the result of the whole batch; divide
    afterwards, with `pooled_mean` or `RunningMean`. `values` are the log-ratios t of mismatched
    responses for KTO and rewards for BCO.
    """
    counted = lengths > 0
    total = torch.where(counted, values.detach().double(), 0.0).sum()
    return torch.stack([total, counted.double().sum()])


def pooled_mean(sums: Tensor) -> Tensor:
    """Mean () of a result (2,) of `sum_and_count`; 0 for a count of 0."""
    return sums[0] / sums[1].clamp(min=1)


class RunningMean:
    """Mean of all values so far, such as BCO's delta; 0 before the first.

    count, mean: () float64.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, sums: Tensor) -> Tensor:
        """Add a result (2,) of `sum_and_count`, summed over the ranks, and return the mean."""
        total, count = sums.unbind()
        self.count = self.count + count
        self.mean = self.mean + (total - count * self.mean) / self.count.clamp(min=1)
        return self.mean

    def state_dict(self) -> dict[str, Tensor]:
        """`count` and `mean`, for a checkpoint."""
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`; raises ValueError for another state."""
        if set(state) != {"count", "mean"}:
            raise ValueError(
                f"state: expected count and mean, got {', '.join(sorted(state)) or 'nothing'}; "
                f"load the state of a RunningMean"
            )
        self.count, self.mean = (state[name].to(self.mean) for name in ("count", "mean"))


OBJECTIVES: tuple[type[PointwiseLoss], ...] = (KTO, KTOSimple, BCO, DDROUnpaired, PROB)
