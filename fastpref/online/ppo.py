"""PPO: proximal policy optimization of a language model, with a learned value of each token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastpref.losses.rollout import PPOOptions
from fastpref.online.advantages import gae, whiten
from fastpref.online.policy_gradient import clipped_surrogate, is_clipped
from fastpref.online.rollouts import Rollouts


@dataclass(frozen=True)
class PPO(PPOOptions):
    """Clipped policy loss and clipped value loss by token, with the KL penalty in the reward.

    loss:   mean_t [max(−A ρ, −A clip(ρ, 1 ± clip)) + value_coef * value loss], A by GAE, whitened
    reward: −kl_coef * (log π_old − log π_ref) of each token; the response's reward on its last
    source: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593

    Defaults are TRL's. value_clip: distance from the old values within which new ones count.
    value_lr: learning rate of the value head, which learns from the hidden states of the policy
        without changing them.
    """

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        values = _required(rollouts.values)
        advantages, returns = gae(
            token_rewards(rollouts, self.kl_coef), values, rollouts.cu_seqlens, self.gamma, self.lam
        )
        if self.whiten_advantages:
            advantages = whiten(advantages)
        return replace(rollouts, token_advantages=advantages, returns=returns)

    def loss(self, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None) -> Tensor:
        assert rollouts.token_advantages is not None
        log_ratios = logps - rollouts.old_logps
        losses = clipped_surrogate(log_ratios, rollouts.token_advantages, self.clip)
        return rollouts.sums(losses + self.value_coef * self.value_losses(values, rollouts))

    def value_losses(self, values: Tensor | None, rollouts: Rollouts) -> Tensor:
        """Loss of the value of each token, (T,), of prepared rollouts."""
        assert rollouts.returns is not None
        old_values = _required(rollouts.values)
        return value_loss(_required(values), old_values, rollouts.returns, self.value_clip)

    def clipped(self, logps: Tensor, rollouts: Rollouts) -> Tensor:
        """Whether the clipping leaves a token without gradient of its advantage, (T,)."""
        assert rollouts.token_advantages is not None
        return is_clipped(logps - rollouts.old_logps, rollouts.token_advantages, self.clip)

    def divisor(self, lengths: Tensor) -> Tensor:
        return lengths.sum()


def token_rewards(rollouts: Rollouts, kl_coef: float) -> Tensor:
    """Reward of each token, (T,): the KL penalty, and the response's reward on its last token."""
    rewards = torch.zeros_like(rollouts.old_logps)
    if kl_coef:
        rewards -= kl_coef * rollouts.log_ratios()
    last = rollouts.cu_seqlens[1:].long() - 1
    return rewards.index_add(0, last, rollouts.rewards.to(rewards))


def value_loss(
    values: Tensor,  # (T,)
    old_values: Tensor,  # (T,)
    returns: Tensor,  # (T,)
    clip: float,
) -> Tensor:  # (T,)
    """max((V − R)², (V_clipped − R)²) / 2, V_clipped within `clip` of the old value."""
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (bounded - returns).square()) / 2


class ValueHead(nn.Linear):
    """Linear map of hidden states (T, D) to values (T,), 0 at the start; fp32 or wider.

    The states are divided by √D, so that one learning rate fits models of different widths.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        scaled = hidden.to(self.weight.dtype) / self.in_features**0.5
        return super().forward(scaled).squeeze(-1)


def _required(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("values: PPO needs a value of each token, got None; use a `ValueHead`")
    return values
