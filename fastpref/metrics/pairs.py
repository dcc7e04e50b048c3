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

The loss is a mean over all pairs, responses or groups. Of equal rewards, such as all of them before
the first step, half count as right, as for a coin. ¹ Omitted for objectives that classify no
response, such as sft on single responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    if isinstance(output, PointwiseOutput | GroupwiseOutput):
        return torch.stack([masked_sum(*column) for column in _columns(output, policy)], dim=1)
    if isinstance(policy, TokenLogps):
        policy = policy.sequences()
    assert isinstance(policy, SequenceLogps)
    sums = pair_sums(output, policy)
    return torch.stack([sums, torch.full_like(sums, output.loss.numel())])


def sums_by_source(output: Output, policy: Logps, sources: Tensor, count: int) -> Tensor:
    """Sums and counts of PAIR_METRICS for each of `count` sources, (2, 7 · count) fp64.

    sources: (B,) int64, source of each pair, response or group. Without host sync.
    """
    sums = output.loss.new_zeros(2, count, len(PAIR_METRICS), dtype=torch.float64)
    for metric, (values, mask) in enumerate(_columns(output, policy)):
        selected = torch.where(mask, values.detach().double(), 0.0)
        sums[0, :, metric].index_add_(0, sources, selected)
        sums[1, :, metric].index_add_(0, sources, mask.double())
    return sums.view(2, -1)


def names_by_source(sources: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns of `sums_by_source`, such as `rewards/margins/SOURCE`."""
    return tuple(f"{metric}/{source}" for source in sources for metric in PAIR_METRICS)


def means(sums: Tensor, names: tuple[str, ...] = PAIR_METRICS) -> Metrics:
    """Means of the metrics with a nonzero count, from (2, M) sums and counts; one host sync."""
    metrics = {name: s / n for name, s, n in zip(names, *sums.tolist(), strict=True) if n}
    for name in names:
        if name.startswith("rewards/margins") and name not in metrics:
            sides = [name.replace("margins", side, 1) for side in ("chosen", "rejected")]
            if all(side in metrics for side in sides):
                metrics[name] = metrics[sides[0]] - metrics[sides[1]]
    return metrics


Column = tuple[Tensor, Tensor]  # values of pairs, responses or groups, and which of them count


def _columns(output: Output, policy: Logps) -> tuple[Column, ...]:
    """PAIR_METRICS of each item, (B,) each."""
    if isinstance(output, PointwiseOutput):
        assert isinstance(policy, UnpairedLogps)
        return _response_columns(output, policy)
    if isinstance(output, GroupwiseOutput):
        assert isinstance(policy, GroupedLogps)
        return _group_columns(output, policy)
    if isinstance(policy, TokenLogps):
        policy = policy.sequences()
    assert isinstance(policy, SequenceLogps)
    every = torch.ones_like(output.loss, dtype=torch.bool)
    return tuple((values, every) for values in _pair_values(output, policy))


def pair_sums(output: LossOutput, policy: SequenceLogps) -> Tensor:
    """Sums over pairs of PAIR_METRICS, (7,) fp64, without gradient or host sync."""
    if output.metric_sums is not None:  # by the loss kernel, in its launch
        return output.metric_sums
    return torch.stack([v.detach().double().sum() for v in _pair_values(output, policy)])


def _pair_values(output: LossOutput, policy: SequenceLogps) -> tuple[Tensor, ...]:
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    return (
        output.loss,
        chosen,
        rejected,
        share_above(chosen, rejected),
        chosen - rejected,
        policy.chosen,
        policy.rejected,
    )


def _response_columns(output: PointwiseOutput, policy: UnpairedLogps) -> tuple[Column, ...]:
    good, rewards = policy.desirable, output.rewards
    every = torch.ones_like(good)
    return (
        (output.loss, every),
        (rewards, good),
        (rewards, ~good),
        (
            share_above(torch.where(good, rewards, -rewards), 0.0),
            every if output.classifies else ~every,
        ),
        (rewards, ~every),  # no count: `means` computes the margin from the two means
        (policy.logps, good),
        (policy.logps, ~good),
    )


def _group_columns(output: GroupwiseOutput, policy: GroupedLogps) -> tuple[Column, ...]:
    best, worst, unequal = best_and_worst(policy)
    scores, rewards, logps = policy.scores, output.rewards, policy.logps
    members = segment_mask(policy.cu_groups, policy.logps.numel())
    worse = members & (scores < scores[best][:, None])
    rival = torch.where(worse, rewards, -math.inf).amax(1)
    return (
        (output.loss, torch.ones_like(unequal)),
        (rewards[best], unequal),
        (rewards[worst], unequal),
        (share_above(rewards[best], rival), unequal),
        (rewards[best] - rewards[worst], unequal),
        (logps[best], unequal),
        (logps[worst], unequal),
    )


def share_above(values: Tensor, others: Tensor | float) -> Tensor:
    """1 where a value is above the other, 1/2 where they are equal, else 0, in fp64."""
    return ((values > others).double() + (values >= others).double()) / 2


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
