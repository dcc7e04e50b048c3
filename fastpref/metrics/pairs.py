"""What a run measures and where it goes: names, windows of steps, files and trackers.

`logps/*` are summed log-probs in nats; rewards are beta·(log pi − log pi_ref), or beta·log pi for
objectives without a reference. Each metric is a mean over what it counts, whatever the
micro-batches, and is left out where it counts nothing:

| metric | pairs | single responses | groups with unequal scores |
|---|---|---|---|
| `…/chosen` | chosen | desirable | the best, by its score |
| `…/rejected` | rejected | undesirable | the worst |
| `rewards/accuracies` | chosen above rejected | the sign of the label | the best above all worse |
| `rewards/margins` | difference | difference of the two means | difference |

The loss is a mean over all pairs, responses or groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import GroupwiseOutput, Logps, LossOutput, Output, PointwiseOutput

PAIR_METRICS = (  # of all kinds, where they are counted as stated above
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


Metrics = dict[str, float]


def sums_and_counts(output: Output, policy: Logps) -> Tensor:
    """Sums of PAIR_METRICS and how many each is a sum of, (2, 7) fp64, without host sync."""
    if isinstance(output, PointwiseOutput):
        assert isinstance(policy, UnpairedLogps)
        return _response_sums(output, policy)
    if isinstance(output, GroupwiseOutput):
        assert isinstance(policy, GroupedLogps)
        return _group_sums(output, policy)
    if isinstance(policy, TokenLogps):
        policy = policy.sequences()
    assert isinstance(policy, SequenceLogps)
    sums = pair_sums(output, policy)
    return torch.stack([sums, torch.full_like(sums, output.loss.numel())])


def means(sums: Tensor, names: tuple[str, ...] = PAIR_METRICS) -> Metrics:
    """Means of the metrics that were counted; (2, M) sums and counts, with one host sync."""
    found = {name: s / n for name, s, n in zip(names, *sums.tolist(), strict=True) if n}
    sides = ("rewards/chosen", "rewards/rejected")
    if "rewards/margins" not in found and all(side in found for side in sides):
        found["rewards/margins"] = found[sides[0]] - found[sides[1]]
    return found


def pair_sums(output: LossOutput, policy: SequenceLogps) -> Tensor:
    """Sums over pairs of PAIR_METRICS, (7,) fp64, without gradient or host sync."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    columns = (
        output.loss,
        chosen,
        rejected,
        chosen > rejected,
        chosen - rejected,
        policy.chosen,
        policy.rejected,
    )
    return torch.stack([column.detach().double().sum() for column in columns])


def _response_sums(output: PointwiseOutput, policy: UnpairedLogps) -> Tensor:
    good, rewards = policy.desirable, output.rewards
    every = torch.ones_like(good)
    columns = (
        (output.loss, every),
        (rewards, good),
        (rewards, ~good),
        (torch.where(good, rewards, -rewards) > 0, every),
        (rewards, ~every),  # margins are those of the means
        (policy.logps, good),
        (policy.logps, ~good),
    )
    return torch.stack([masked_sum(*column) for column in columns], dim=1)


def _group_sums(output: GroupwiseOutput, policy: GroupedLogps) -> Tensor:
    best, worst, unequal = best_and_worst(policy)
    scores, rewards, logps = policy.scores, output.rewards, policy.logps
    worse = _members(policy) & (scores < scores[best][:, None])
    rival = torch.where(worse, rewards, -math.inf).amax(1)
    columns = (
        (output.loss, torch.ones_like(unequal)),
        (rewards[best], unequal),
        (rewards[worst], unequal),
        (rewards[best] > rival, unequal),
        (rewards[best] - rewards[worst], unequal),
        (logps[best], unequal),
        (logps[worst], unequal),
    )
    return torch.stack([masked_sum(*column) for column in columns], dim=1)


def best_and_worst(policy: GroupedLogps) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the first best and first worst response of each group by its score, (G,), and
    whether the two scores differ, (G,) bool."""
    members, scores = _members(policy), policy.scores
    best = torch.where(members, scores, -math.inf).argmax(1)
    worst = torch.where(members, scores, math.inf).argmin(1)
    return best, worst, scores[best] > scores[worst]


def _members(policy: GroupedLogps) -> Tensor:
    """Whether a response belongs to a group, (G, S) bool."""
    position = torch.arange(policy.logps.numel(), device=policy.logps.device)
    return (policy.cu_groups[:-1, None] <= position) & (position < policy.cu_groups[1:, None])


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is true, and how many they are, (2,) fp64."""
    kept = torch.where(mask, values.detach().double(), 0.0)
    return torch.stack([kept.sum(), mask.double().sum()])


def mean(sum_and_count: Tensor) -> float:
    """The mean of a (2,) sum and count."""
    total, count = sum_and_count.tolist()
    mean: float = total / count
    return mean
