"""The plan covers every pair once an epoch within its budgets; batches hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpref.data.batches import Plan, collate, pack
from fastpref.data.formats import DataError
from fastpref.data.tokens import TokenPair

LENGTHS = np.random.default_rng(0).integers(2, 60, size=101)


def pair(prompt: list[int], chosen: list[int], rejected: list[int], index: int = 0) -> TokenPair:
    ids = (np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected))
    return TokenPair(index, index + 1, *ids, preference=None)


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("seed", [0, 7, None])
def test_an_epoch_visits_every_pair_once(epoch: int, seed: int | None) -> None:
    plan = Plan(LENGTHS, batch_size=8, max_tokens=300, seed=seed)
    steps = list(plan.epoch(epoch))
    assert len(steps) == plan.steps_per_epoch == 13
    assert sorted(i for step in steps for part in step for i in part) == list(range(101))
    assert [sum(map(len, step)) for step in steps] == [8] * 12 + [5]


def test_micro_batches_keep_the_budget_and_the_step_its_pairs() -> None:
    small, large = (Plan(LENGTHS, 8, tokens, seed=3) for tokens in (120, 10_000))
    for number in range(small.steps_per_epoch):
        parts = small.step(number)
        assert all(2 * len(part) * LENGTHS[part].max() <= 120 for part in parts)
        (whole,) = large.step(number)
        assert sorted(i for part in parts for i in part) == sorted(whole)


def test_the_plan_is_a_function_of_the_seed_and_the_step() -> None:
    plan, twin, other = (Plan(LENGTHS, 8, 300, seed) for seed in (1, 1, 2))
    assert [plan.step(k) for k in range(30)] == [twin.step(k) for k in range(30)]
    assert plan.step(0) != other.step(0)
    assert plan.step(0) != plan.step(plan.steps_per_epoch), "epochs are shuffled anew"


def test_a_budget_below_the_longest_pair_is_refused() -> None:
    cost = 2 * int(LENGTHS.max())
    with pytest.raises(DataError, match=rf"training.max_tokens: {cost - 1} cannot hold .*{cost} "):
        Plan(LENGTHS, 8, cost - 1, seed=0)
    Plan(LENGTHS, 8, cost, seed=0)


def test_a_pair_over_the_budget_is_packed_alone() -> None:
    assert pack([0, 1, 2], np.array([100, 3, 3]), max_tokens=12) == [[0], [1, 2]]


def test_collate() -> None:
    batch = collate([pair([1, 2], [3], [4, 5], index=9), pair([6], [7, 8, 9], [10], index=4)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [6, 7, 8, 9], [1, 2, 4, 5], [6, 10, 0, 0]]
    assert batch.labels.tolist() == [3, 7, 8, 9, 4, 5, 10]
    assert batch.cu_seqlens.tolist() == [0, 1, 4, 6, 7]
    assert batch.lengths.tolist() == [1, 3, 2, 1]
    assert batch.index.tolist() == [9, 4]
    assert batch.tokens == 3 + 4 + 4 + 2
    # The token after each position is the label that its hidden state predicts.
    following = batch.input_ids.flatten()[batch.positions + 1]
    assert torch.equal(following, batch.labels)


def test_soft_labels() -> None:
    soft = TokenPair(0, 1, *(np.array([1], dtype=np.int32),) * 3, preference=0.7)
    batch = collate([soft, soft])
    assert batch.preference is not None and batch.preference.tolist() == [0.7, 0.7]
    assert collate([pair([1], [2], [3])]).preference is None
