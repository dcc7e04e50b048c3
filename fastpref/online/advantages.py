"""Advantages: how much better a sampled token or response is than expected.

They are constants of a round and carry no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpref.logps import segment_positions, segment_sum

Scale = Literal["group", "batch", "none"]
# Added to standard deviations: a group with equal rewards has advantages 0.
STD_EPS = 1e-4
VARIANCE_EPS = 1e-8


def gae(
    rewards: Tensor,  # (T,)
    values: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,)
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """Generalized advantage estimates of tokens, and the returns that the values should predict.

        delta_t  = rewards[t] + gamma * values[t + 1] - values[t]
        adv_t    = delta_t + gamma * lam * adv_{t + 1}
        return_t = adv_t + values[t]

    with 0 for both after the last token of a response. Schulman et al. 2016, Eq. 16,
    arXiv:1506.02438.
    """
    advantages = torch.zeros_like(values)
    ends, lengths = cu_seqlens[1:].long(), cu_seqlens.diff()
    advantage, next_value = (values.new_zeros(len(lengths)) for _ in range(2))
    for from_end in range(int(lengths.max()) if len(lengths) else 0):
        alive = (lengths > from_end).nonzero().squeeze(1)
        t = ends[alive] - 1 - from_end
        delta = rewards[t] + gamma * next_value[alive] - values[t]
        advantage[alive] = delta + gamma * lam * advantage[alive]
        next_value[alive] = values[t]
        advantages[t] = advantage[alive]
    return advantages, advantages + values


def whiten(values: Tensor) -> Tensor:
    """Values (N,) shifted and scaled to mean 0 and variance 1; equal ones, or a single one, give 0.

    The sums are in fp64: a mean of equal values in fp32 may differ from them.
    """
    wide = values.double()
    centered = wide - wide.mean()
    variance = centered.square().sum() / max(1, len(values) - 1)
    return (centered * torch.rsqrt(variance + VARIANCE_EPS)).to(values)


def leave_one_out(
    rewards: Tensor,  # (S,)
    cu_groups: Tensor,  # (G + 1,)
) -> Tensor:  # (S,)
    """Reward of each response less the mean reward of the others in its group.

    Ahmadian et al. 2024, Eq. 8, arXiv:2402.14740. Raises ValueError for a group of one response.
    """
    mean, sizes = _means(rewards, cu_groups)
    return (rewards - mean) * sizes / (sizes - 1)


def group_normalized(
    rewards: Tensor,  # (S,)
    cu_groups: Tensor,  # (G + 1,)
    scale: Scale = "group",
) -> Tensor:  # (S,) fp64
    """Reward of each response less its group's mean, divided by a standard deviation.

    scale: the standard deviation of the "group" (GRPO; Shao et al. 2024, section 4.1.2,
        arXiv:2402.03300) or of the whole "batch", both with Bessel's correction; or "none"
        (Dr. GRPO; Liu et al. 2025, section 3.2, arXiv:2503.20783).

    The result is in fp64: a mean of equal rewards in fp32 may differ from them, by more than
    STD_EPS where they are large.

    Raises ValueError for a group of one response, or another `scale`.
    """
    rewards = rewards.double()
    mean, sizes = _means(rewards, cu_groups)
    centered = rewards - mean
    if scale == "none":
        return centered
    if scale == "batch":
        return centered / (rewards.std() + STD_EPS)
    if scale != "group":
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    group = segment_positions(cu_groups, len(rewards))[0]
    variance = segment_sum(centered.square(), cu_groups)[group] / (sizes - 1)
    return centered / (variance.sqrt() + STD_EPS)


def _means(rewards: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean reward and size of each response's group, (S,) and (S,)."""
    sizes = cu_groups.diff()
    if (sizes == 1).any():
        raise ValueError(
            "cu_groups: a group of one response has no others to compare with; "
            "sample at least 2 responses for each prompt"
        )
    group = segment_positions(cu_groups, len(rewards))[0]
    means = segment_sum(rewards, cu_groups) / sizes.clamp(min=1)
    return means[group], sizes[group]
