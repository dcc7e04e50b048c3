"""Rollouts: shapes, sums over responses, minibatches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpref.online.rollouts import Rollouts

ROLLOUTS = Rollouts(
    torch.tensor([0, 2, 3, 6]),
    old_logps=-torch.arange(6.0),
    rewards=torch.tensor([1.0, 2.0, 3.0]),
    ref_logps=torch.full((6,), -1.0),
    cu_groups=torch.tensor([0, 3]),
)


def test_sums_and_repetitions_are_by_response() -> None:
    assert ROLLOUTS.lengths.tolist() == [2, 1, 3]
    assert ROLLOUTS.sums(ROLLOUTS.old_logps).tolist() == [-1, -2, -12]
    assert ROLLOUTS.per_token(ROLLOUTS.rewards).tolist() == [1, 1, 2, 3, 3, 3]
    assert ROLLOUTS.log_ratios().tolist() == [1, 0, -1, -2, -3, -4]


def test_a_minibatch_has_the_tokens_of_its_responses_in_their_order() -> None:
    part = replace(ROLLOUTS, advantages=torch.tensor([7.0, 8.0, 9.0])).select([2, 0])
    assert part.cu_seqlens.tolist() == [0, 3, 5]
    assert part.old_logps.tolist() == [-3, -4, -5, 0, -1]
    assert part.rewards.tolist() == [3, 1]
    assert part.advantages is not None and part.advantages.tolist() == [9, 7]
    assert part.values is None and part.cu_groups is None


def test_what_is_missing_or_misshapen_is_named() -> None:
    with pytest.raises(ValueError, match=r"values: expected shape \(6,\), got \(3,\)"):
        replace(ROLLOUTS, values=torch.zeros(3))
    with pytest.raises(ValueError, match="ref_logps: the KL penalty needs the reference's"):
        replace(ROLLOUTS, ref_logps=None).log_ratios()
    with pytest.raises(ValueError, match="cu_groups: expected the offsets of the groups"):
        replace(ROLLOUTS, cu_groups=None).groups()
