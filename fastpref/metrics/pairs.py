"""Sums and counts of losses, rewards and log-probs, from which the metrics are means.

`logps/*` are summed log-probs in nats; rewards are beta·(log pi − log pi_ref), or beta·log pi for
objectives without a reference. Each metric is a mean over the items below, independent of the
micro-batches, and is omitted if there are none:

| metric | pairs | single responses | groups with unequal scores |
|---|---|---|---|
| `…/chosen` | chosen | desirable | the best, by its score |
| `…/rejected` | rejected | undesirable | the worst |
| `rewards/accuracies` | chosen above rejected | the sign of the label¹ | the best above all worse |
| `rewards/margins` | difference | difference of the two means | difference |

The loss is a mean over all pairs, responses or groups. ¹ Omitted for objectives that classify no
response, such as sft on single responses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.logps import (
    GroupedLogps,
    SequenceLogps,
    TokenLogps,
    UnpairedLogps,
    segment_mask,
)
from fastpref.losses import GroupwiseOutput, Logps, LossOutput, Output, PointwiseOutput

# Metrics of all kinds of objectives; see the table above.
PAIR_METRICS = (
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
    """Sums and counts of PAIR_METRICS, (2, 7) fp64, without host sync."""
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
    """Means of the metrics with a nonzero count, from (2, M) sums and counts; one host sync."""
    metrics = {name: s / n for name, s, n in zip(names, *sums.tolist(), strict=True) if n}
    sides = ("rewards/chosen", "rewards/rejected")
    if "rewards/margins" not in metrics and all(side in metrics for side in sides):
        metrics["rewards/margins"] = metrics[sides[0]] - metrics[sides[1]]
    return metrics


def pair_sums(output: LossOutput, policy: SequenceLogps) -> Tensor:
    """Sums over pairs of PAIR_METRICS, (7,) fp64, without gradient or host sync."""
    if output.metric_sums is not None:  # by the loss kernel, in its launch
        return output.metric_sums
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
        (torch.where(good, rewards, -rewards) > 0, every if output.classifies else ~every),
        (rewards, ~every),  # no count: `means` computes the margin from the two means
        (policy.logps, good),
        (policy.logps, ~good),
    )
    return torch.stack([masked_sum(*column) for column in columns], dim=1)


def _group_sums(output: GroupwiseOutput, policy: GroupedLogps) -> Tensor:
    best, worst, unequal = best_and_worst(policy)
    scores, rewards, logps = policy.scores, output.rewards, policy.logps
    members = segment_mask(policy.cu_groups, policy.logps.numel())
    worse = members & (scores < scores[best][:, None])
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
    """Indices of the best and the worst response of each group by score, and whether they differ.

    Returns (G,) int64, (G,) int64 and (G,) bool; ties go to the first response.
    """
    members, scores = segment_mask(policy.cu_groups, policy.logps.numel()), policy.scores
    best = torch.where(members, scores, -math.inf).argmax(1)
    worst = torch.where(members, scores, math.inf).argmin(1)
    return best, worst, scores[best] > scores[worst]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum and count of the values where the mask is true, (2,) fp64."""
    selected = torch.where(mask, values.detach().double(), 0.0)
    return torch.stack([selected.sum(), mask.double().sum()])


def mean(sum_and_count: Tensor) -> float:
    """Mean from a (2,) sum and count."""
    total, count = sum_and_count.tolist()
    mean: float = total / count
    return mean
