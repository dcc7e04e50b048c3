"""Objectives of reward models, whose output is one number for each response.

They take rewards where other objectives take summed log-probs, and need no reference. `fastpref
reward` trains with them alone. Notation of the docstrings: x_w, x_l are the rewards of the chosen
and the rejected response, x_i those of a group of N responses with scores s_i, and y is 1 for a
desirable response and else 0; d = -dL/dx are the incentives. S is the logistic function, LS its
logarithm, c is center_rewards_coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps
from fastpref.losses.base import PairwiseLoss, number
from fastpref.losses.groupwise import GroupwiseLoss
from fastpref.losses.offset import check_margin
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.utils.lazy_torch import Tensor, logsigmoid, torch


@dataclass(frozen=True)
class BradleyTerry(PairwiseLoss):
    """Bradley-Terry: the difference of two rewards is the logit of the preference.

    loss:       -LS(x_w - x_l - offset * m) + c * (x_w + x_l)^2, x the rewards, m the margin of the
                pair in the data, c = center_rewards_coefficient
    incentives: d_w = S(-(x_w - x_l - offset * m)) - 2 * c * (x_w + x_l),
                d_l = S(-(x_w - x_l - offset * m)) + 2 * c * (x_w + x_l)
    source:     Ouyang et al. 2022, Eq. 1, arXiv:2203.02155; margin: Touvron et al. 2023,
                arXiv:2307.09288; centering: Eisenstein et al. 2023, arXiv:2312.09244
    use:        for pairs; rewards are known up to a constant of the prompt, which centering sets

    With a soft label p the optimum is x_w - x_l = log(p / (1 - p)). The reversed pair of a soft
    label has the margin -m.
    """

    name: ClassVar[str] = "bradley_terry"
    needs_reference: ClassVar[bool] = False
    of_rewards: ClassVar[bool] = True
    center_rewards_coefficient: float = number(0.0, at_least=0)
    offset: float = number(0.0, at_least=0)

    @property
    def needs_margin(self) -> bool:  # type: ignore[override]
        return self.offset > 0

    def check(
        self,
        policy: SequenceLogps,
        reference: SequenceLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        super().check(policy, reference, reference_point)
        if self.needs_margin:
            check_margin(self.name, policy)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return logps

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        difference = policy.chosen - policy.rejected
        if self.needs_margin:
            assert policy.margin is not None
            difference = difference - self.offset * policy.margin.to(difference.dtype)
        center = (policy.chosen + policy.rejected).square()
        return self.center_rewards_coefficient * center - logsigmoid(difference)


@dataclass(frozen=True)
class _GroupRewards(GroupwiseLoss):
    """A reward objective on groups; a subclass writes the share of each response."""

    needs_reference: ClassVar[bool] = False
    of_rewards: ClassVar[bool] = True
    # A reward is the output itself.
    beta: ClassVar[float] = 1.0  # type: ignore[misc]

    def rewards(self, policy: GroupedLogps, reference: GroupedLogps | None) -> Tensor:
        """Outputs (S,) of the model; a reference is ignored."""
        return policy.logps

    def check(
        self,
        policy: GroupedLogps,
        reference: GroupedLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        self.refuse_reference_point(reference_point)


@dataclass(frozen=True)
class PlackettLuce(_GroupRewards):
    """Plackett-Luce: the likelihood of the whole order of a group, from best to worst score.

    loss:       sum_i log(sum_{j: s_j <= s_i} exp(x_j - x_i)) + c * (sum_i x_i)^2, x the rewards, s
                the scores, c = center_rewards_coefficient
    incentives: d_i = 1 - sum_{k: s_k >= s_i} exp(x_i) / sum_{j: s_j <= s_k} exp(x_j)
                - 2 * c * sum_j x_j
    source:     Plackett 1975; for rewards: Ouyang et al. 2022, arXiv:2203.02155
    use:        for several scored responses to a prompt, where only the order of scores counts

    Of two responses the loss is that of `bradley_terry`. Responses with equal scores each compete
    with each other (Breslow's form), which pulls their rewards together.
    """

    name: ClassVar[str] = "plackett_luce"
    center_rewards_coefficient: float = number(0.0, at_least=0)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        not_better = same & (policy.scores <= policy.scores[:, None])
        rivals = torch.where(not_better, rewards, -torch.inf).logsumexp(1)
        total = torch.where(same, rewards, 0.0).sum(1)
        center = self.center_rewards_coefficient * total.square() / same.sum(1)
        return rivals - rewards + center


@dataclass(frozen=True)
class RewardRegression(_GroupRewards):
    """Regression of scores: the reward of a response is its score in the data.

    loss:       mean_i (x_i - s_i)^2, x the rewards, s the scores
    incentives: d_i = 2 * (s_i - x_i) / N
    source:     least squares; for rewards: Wang et al. 2024 (HelpSteer2), arXiv:2406.08673
    use:        for ratings on a scale that is the same for all prompts, of one response or more
    """

    name: ClassVar[str] = "reward_regression"

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        return (rewards - policy.scores.to(rewards)).square() / same.sum(1)


@dataclass(frozen=True)
class LabelRegression(PointwiseLoss):
    """Regression of labels: the reward of a desirable response is 1, that of another one 0.

    loss:       (x - y)^2, x the reward, y = 1 for a desirable response, else 0
    incentives: d = 2 * (y - x)
    source:     least squares
    use:        for single responses with a label; the reward is the share of desirable responses
    """

    name: ClassVar[str] = "label_regression"
    needs_reference: ClassVar[bool] = False
    of_rewards: ClassVar[bool] = True

    def reward(self, log_ratios: Tensor) -> Tensor:
        return log_ratios

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        return (log_ratios - policy.desirable.to(log_ratios)).square()

    def __call__(
        self,
        policy: UnpairedLogps,
        reference: UnpairedLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> PointwiseOutput:
        """Loss and reward of each response; a reference is ignored."""
        self.check(policy, reference, reference_point)
        loss = self.response_loss(policy.logps, policy, policy.logps.new_zeros(()))
        # No sign of a reward says what the label is: the boundary is at 1/2.
        return PointwiseOutput(loss, policy.logps.detach(), classifies=False)

    def check(
        self,
        policy: UnpairedLogps,
        reference: UnpairedLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        self.refuse_reference_point(reference_point)


OBJECTIVES: tuple[type[Any], ...] = (BradleyTerry, PlackettLuce, RewardRegression, LabelRegression)
