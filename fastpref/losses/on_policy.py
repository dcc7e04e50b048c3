"""Objectives on groups of responses that the policy itself has just sampled.

Their gradients are those of policy gradient methods, unbiased for samples of the current weights:
in `fastpref rounds` with `steps: 1`, and nearly so with a few steps. `rloo` and `nash_md` are
squares with the same gradient, which are 0 at the optimum; `gspo` accounts for the steps within a
round by ratios to the policy that sampled. Notation: see `groupwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastpref.logps import GroupedLogps
from fastpref.losses.base import choice, number
from fastpref.losses.groupwise import GroupwiseLoss
from fastpref.losses.rollout import refusal
from fastpref.utils.lazy_torch import Tensor, torch


@dataclass(frozen=True)
class RLOO(GroupwiseLoss):
    """REINFORCE with a leave-one-out baseline: raises responses that score above the others.

    loss:       beta / (2 * N * (N - 1)) * sum_{i<j} (t_i - t_j - (scores_i - scores_j) / beta)^2
    incentives: d_i = A_i / N, A_i = R_i - mean_{j != i} R_j, R_i = scores_i - beta * t_i
    source:     Ahmadian et al. 2024, Eq. 8, arXiv:2402.14740
    use:        on the policy's own samples, in rounds of one step, where the sizes of the scores
                count; the reference must be the model at the start, to which the penalty pulls

    Rewards are beta * t. The optimum is that of scores - beta * KL(policy || reference), the
    policy in proportion to reference * exp(scores / beta): t_i = scores_i / beta, up to a constant
    of the prompt. A single response has no others to compare with, and no loss. The gradient is
    that of -A_i * z_i with a constant A_i, the policy gradient with the KL penalty in the reward.
    """

    name: ClassVar[str] = "rloo"
    beta: float = number(0.05, above=0)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        values = rewards - policy.scores.to(rewards)
        # Each pair stands in two rows.
        squares = torch.where(same, (values[:, None] - values).square(), 0.0).sum(1) / 2
        n = same.sum(1).to(rewards)
        return squares / (2 * self.beta * n * (n - 1).clamp(min=1))


@dataclass(frozen=True)
class NashMD(GroupwiseLoss):
    """Nash learning by self-play: raises responses that win more than half against the others.

    loss:       beta / (2 * N) * sum_i (t_i - (P_i - 1/2) / beta)^2,
                P_i = mean_{j != i} S(scores_i - scores_j)
    incentives: d_i = (P_i - 1/2 - beta * t_i) / N
    source:     Munos et al. 2023, section 7, arXiv:2312.00886
    use:        on the policy's own samples, in rounds of one step, where a score only says how
                surely a response is preferred; differences above some 5 all count the same

    Rewards are beta * t. The scores are those of a reward model, whose differences are logits of
    preferences. The opponent is the policy itself, and the optimum the Nash equilibrium of the
    game with a KL penalty, the policy in proportion to reference * exp(P(y beats policy) / beta).
    A single response has P = 1/2. With mixture > 0, in rounds alone, the opponents are samples of
    their own, from the policy to the power of 1 - mixture times the reference to that of mixture,
    token by token; the paper and TRL have 1/2.
    """

    name: ClassVar[str] = "nash_md"
    beta: float = number(0.1, above=0)
    mixture: float = number(0.0, at_least=0, at_most=1)

    @property
    def of_rollouts(self) -> bool:  # type: ignore[override]
        return self.mixture > 0

    def check(
        self,
        policy: GroupedLogps,
        reference: GroupedLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        if self.of_rollouts:
            raise ValueError(refusal(self.name))
        super().check(policy, reference, reference_point)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        scores, n = policy.scores.to(rewards), same.sum(1).to(rewards)
        # The difference of a response from itself counts 0.
        wins = torch.where(same, torch.sigmoid(scores[:, None] - scores) - 0.5, 0.0).sum(1)
        return (rewards - wins / (n - 1).clamp(min=1)).square() / (2 * self.beta * n)


# Added to standard deviations: a group with equal scores has advantages 0.
_STD_EPS = 1e-4


@dataclass(frozen=True)
class GSPO(GroupwiseLoss):
    """Group sequence policy optimization: GRPO with one clipped ratio for each whole response.

    loss:       1/N * sum_i max(-A_i * s_i, -A_i * min(max(s_i, 1 - epsilon), 1 + epsilon_high)),
                s_i = exp(t_i / n_i), A_i = (scores_i - mean(scores)) / (std(scores) + 1e-4)
    incentives: d_i = A_i * s_i / (N * n_i), and 0 where A_i > 0 and s_i > 1 + epsilon_high, or
                A_i < 0 and s_i < 1 - epsilon
    source:     Zheng et al. 2025, section 4, arXiv:2507.18071
    use:        on the policy's own samples, in rounds of several steps, in place of `rloo`; the
                reference must be the policy that sampled, `rounds.reference: round`, and nothing
                but the clipping holds the policy near the start of the run

    Rewards are t; n_i is the number of tokens. The standard deviation is that of the group with
    Bessel's correction; scale_rewards="none" leaves the division out, as in Dr. GRPO. In the first
    step of a round all s are 1, and the gradient is that of GRPO without a KL penalty. A single
    response has no others to compare with, and no gradient.
    """

    name: ClassVar[str] = "gspo"
    beta: ClassVar[float] = 1.0  # type: ignore[misc]
    epsilon: float = number(3e-4, above=0, below=1)
    epsilon_high: float = number(4e-4, above=0)
    scale_rewards: Literal["group", "none"] = choice("group", "none")

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        advantages = self._advantages(policy.scores.to(rewards), same)
        ratios = (rewards / policy.lengths.clamp(min=1)).exp()
        bounded = ratios.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        return torch.maximum(-advantages * ratios, -advantages * bounded) / same.sum(1)

    def _advantages(self, scores: Tensor, same: Tensor) -> Tensor:
        n = same.sum(1)
        centered = scores - torch.where(same, scores, 0.0).sum(1) / n
        if self.scale_rewards == "none":
            return centered
        variance = torch.where(same, centered.square(), 0.0).sum(1) / (n - 1).clamp(min=1)
        return centered / (variance.sqrt() + _STD_EPS)


OBJECTIVES: tuple[type[GroupwiseLoss], ...] = (RLOO, NashMD, GSPO)
