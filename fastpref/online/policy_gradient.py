"""RLOO and GRPO: policy gradients whose baseline is the other responses to the same prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpref.losses.rollout import GRPOOptions
from fastpref.online.advantages import group_normalized, leave_one_out, whiten
from fastpref.online.rollouts import Rollouts


def clipped_surrogate(
    log_ratios: Tensor,  # (N,) log π − log π_old of tokens or of responses
    advantages: Tensor,  # (N,)
    clip: float,
    clip_high: float | None = None,
) -> Tensor:  # (N,)
    """PPO's loss: max(−A ρ, −A clip(ρ, 1 − clip, 1 + clip_high)), ρ = exp(log_ratios).

    clip_high is `clip` unless it is set. Schulman et al. 2017, Eq. 7, arXiv:1707.06347.
    """
    ratios = log_ratios.exp()
    bounded = ratios.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return torch.maximum(-advantages * ratios, -advantages * bounded)


def is_clipped(
    log_ratios: Tensor,  # (N,)
    advantages: Tensor,  # (N,)
    clip: float,
    clip_high: float | None = None,
) -> Tensor:  # (N,) bool
    """Whether `clipped_surrogate` has no gradient because its ratio has left the bounds."""
    ratios = log_ratios.exp()
    above = ratios > 1 + (clip if clip_high is None else clip_high)
    return (above & (advantages > 0)) | ((ratios < 1 - clip) & (advantages < 0))


@dataclass(frozen=True)
class RLOO:
    """REINFORCE with a leave-one-out baseline; the whole response is one action.

    loss:   max(−A ρ, −A clip(ρ)), ρ = π(y) / π_old(y)
            A = R − mean of the others' R, R = reward − beta * (log π_old(y) − log π_ref(y))
    source: Ahmadian et al. 2024, arXiv:2402.14740; the clipped ratio is TRL's

    On the samples of the current policy ρ is 1, and the gradient is that of −A log π(y).
    normalize_advantages: whiten A over the batch.
    """

    beta: float = 0.05
    clip: float = 0.2
    normalize_advantages: bool = False

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        rewards = penalized(rollouts, self.beta)
        advantages = leave_one_out(rewards, rollouts.groups())
        if self.normalize_advantages:
            advantages = whiten(advantages)
        return replace(rollouts, advantages=advantages)

    def loss(self, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None) -> Tensor:
        assert rollouts.advantages is not None
        log_ratios = rollouts.sums(logps - rollouts.old_logps)
        return clipped_surrogate(log_ratios, rollouts.advantages, self.clip)

    def divisor(self, lengths: Tensor) -> float:
        return len(lengths)


@dataclass(frozen=True)
class GRPO(GRPOOptions):
    """Group relative policy optimization: PPO's loss by token with advantages of the group.

    loss:   mean_t [max(−A ρ_t, −A clip(ρ_t)) + beta * k3_t]
            A = (reward − mean) / std of the group
            k3 = exp(−d) + d − 1, d = log π − log π_ref, an estimate of KL(π || π_ref)
    source: Shao et al. 2024, Eq. 3 and 4, arXiv:2402.03300

    `GRPO.dr(max_tokens)` is Dr. GRPO, arXiv:2503.20783: no division by the standard deviation, and
    none by the length of each response.
    max_tokens: divisor of the summed loss of a response's tokens, in place of its length.
    """

    @classmethod
    def dr(cls, max_tokens: int, beta: float = 0.0) -> GRPO:
        return cls(beta, scale_rewards="none", max_tokens=max_tokens)

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        advantages = group_normalized(rollouts.rewards, rollouts.groups(), self.scale_rewards)
        return replace(rollouts, advantages=advantages.to(rollouts.old_logps))

    def loss(self, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None) -> Tensor:
        assert rollouts.advantages is not None
        advantages = rollouts.per_token(rollouts.advantages)
        log_ratios = logps - rollouts.old_logps
        losses = clipped_surrogate(log_ratios, advantages, self.clip, self.clip_high)
        if self.beta:
            rollouts.log_ratios()  # refuses rollouts without a reference
            assert rollouts.ref_logps is not None
            losses = losses + self.beta * k3(logps, rollouts.ref_logps)
        sums = rollouts.sums(losses)
        return sums / (rollouts.lengths if self.max_tokens is None else self.max_tokens)

    def clipped(self, logps: Tensor, rollouts: Rollouts) -> Tensor:
        """Whether the clipping leaves a token without gradient of its advantage, (T,)."""
        assert rollouts.advantages is not None
        advantages = rollouts.per_token(rollouts.advantages)
        return is_clipped(logps - rollouts.old_logps, advantages, self.clip, self.clip_high)

    def divisor(self, lengths: Tensor) -> float:
        return len(lengths)


def penalized(rollouts: Rollouts, beta: float) -> Tensor:
    """Rewards (S,) less beta times the log-ratio of the policy that sampled to the reference."""
    if not beta:
        return rollouts.rewards
    return rollouts.rewards - beta * rollouts.sums(rollouts.log_ratios())


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate >= 0 of KL(π || π_ref) from tokens that π sampled, with gradient, (T,), nats.

    Schulman 2020, "Approximating KL divergence".
    """
    difference = ref_logps - logps
    return difference.exp() - difference - 1
