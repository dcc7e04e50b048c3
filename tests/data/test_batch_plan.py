"""The plan covers every group once per epoch, within its budgets, in each layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastpref.data.batch_plan import Plan, tokens_of
from fastpref.data.readers import DataError

LENGTHS = np.random.default_rng(0).integers(2, 60, size=101)
PAIRS = np.full(101, 2)


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("seed", [0, 7, None])
def test_an_epoch_visits_every_pair_once(epoch: int, seed: int | None) -> None:
    plan = Plan(LENGTHS, PAIRS, batch_size=8, max_tokens=300, seed=seed)
    steps = list(plan.epoch(epoch))
    assert len(steps) == plan.steps_per_epoch == 13
    assert sorted(i for step in steps for part in step for i in part) == list(range(101))
    assert [sum(map(len, step)) for step in steps] == [8] * 12 + [5]


def test_micro_batches_keep_the_budget_and_the_step_its_pairs() -> None:
    small, large = (Plan(LENGTHS, PAIRS, 8, tokens, seed=3) for tokens in (120, 10_000))
    for number in range(small.steps_per_epoch):
        parts = small.step(number)
        assert all(2 * len(part) * LENGTHS[part].max() <= 120 for part in parts)
        (whole,) = large.step(number)
        assert sorted(i for part in parts for i in part) == sorted(whole)


def test_the_plan_is_a_function_of_the_seed_and_the_step() -> None:
    plan, twin, other = (Plan(LENGTHS, PAIRS, 8, 300, seed) for seed in (1, 1, 2))
    assert [plan.step(k) for k in range(30)] == [twin.step(k) for k in range(30)]
    assert plan.step(0) != other.step(0)
    assert plan.step(0) != plan.step(plan.steps_per_epoch), "epochs are shuffled anew"


def test_a_budget_below_the_longest_pair_is_refused() -> None:
    cost = 2 * int(LENGTHS.max())
    with pytest.raises(
        DataError, match=rf"training.micro_batch_tokens: {cost - 1} cannot hold .*{cost} "
    ):
        Plan(LENGTHS, PAIRS, 8, cost - 1, seed=0)
    Plan(LENGTHS, PAIRS, 8, cost, seed=0)


def test_groups_of_many_sizes_keep_the_budget() -> None:
    sizes = np.random.default_rng(1).integers(1, 6, size=101)
    plan = Plan(LENGTHS, sizes, 16, 300, seed=3)
    steps = list(plan.epoch())
    assert sorted(i for step in steps for part in step for i in part) == list(range(101))
    for step in steps:
        costs = [sizes[part].sum() * LENGTHS[part].max() for part in step]
        assert max(costs) <= 300
        # The first group of a micro-batch has no room in any before it.
        for k, part in enumerate(step):
            for before, cost in zip(step[:k], costs[:k], strict=True):
                assert cost + sizes[part[0]] * LENGTHS[before].max() > 300
    largest = int((sizes * LENGTHS).max())
    with pytest.raises(DataError, match=rf"cannot hold the longest group \({largest} tokens"):
        Plan(LENGTHS, sizes, 16, largest - 1, seed=3, unit="group")


def test_packed_rows_are_filled_to_the_budget() -> None:
    plan = Plan(LENGTHS, None, 32, 120, seed=3)
    for step in plan.epoch():
        loads = [int(LENGTHS[part].sum()) for part in step]
        assert max(loads) <= 120
        for k, part in enumerate(step):
            assert all(load + LENGTHS[part[0]] > 120 for load in loads[:k])


class Three:
    """A pair, a group of four and a single response."""

    kind = "groupwise"
    offsets = np.array([0, 2, 6, 7])
    prompt_lengths = np.array([10, 5, 1])
    response_lengths = np.array([3, 4, 1, 2, 3, 4, 9])
    padded_lengths = np.array([14, 9, 10])


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [("padded", [28, 36, 10]), ("packed", [27, 30, 10]), ("prefix_shared", [17, 15, 10])],
)
def test_tokens_of_a_layout(layout: Any, tokens: list[int]) -> None:
    groups: Any = Three()
    assert tokens_of(groups, layout).tolist() == tokens
    assert Plan.of(groups, 3, max(tokens), layout=layout).steps_per_epoch == 1
    with pytest.raises(DataError, match=f"cannot hold the longest group .{max(tokens)} tokens"):
        Plan.of(groups, 3, max(tokens) - 1, layout=layout)


@pytest.mark.parametrize("rows", [None, PAIRS])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_groups_of_a_step(ranks: int, rows: Any) -> None:
    alone = Plan(LENGTHS, rows, 16, 150, seed=3)
    shared = [Plan(LENGTHS, rows, 16, 150, seed=3, ranks=ranks, rank=r) for r in range(ranks)]
    for number in range(alone.steps_per_epoch):
        parts = [plan.step(number) for plan in shared]
        assert len({len(rank_parts) for rank_parts in parts}) == 1, "same number of micro-batches"
        assert sorted(i for rank_parts in parts for part in rank_parts for i in part) == sorted(
            alone.groups(number)
        )
        for part in (part for rank_parts in parts for part in rank_parts if part):
            longest, size = LENGTHS[part].max(), 2 * len(part)
            assert (LENGTHS[part].sum() if rows is None else longest * size) <= 150


def test_the_micro_batches_of_all_ranks_weigh_much_the_same() -> None:
    plans = [Plan(LENGTHS, None, 64, 400, seed=3, ranks=4, rank=r) for r in range(4)]
    loads = [LENGTHS[part].sum() for plan in plans for part in plan.step(0)]
    assert max(loads) - min(loads) <= LENGTHS.min() + 10


def test_a_rank_without_groups_has_empty_micro_batches() -> None:
    plans = [Plan(LENGTHS[:5], None, 5, 400, ranks=8, rank=r) for r in range(8)]
    assert [sum(map(len, plan.step(0))) for plan in plans] == [1] * 5 + [0] * 3
    assert all(len(plan.step(0)) == 1 for plan in plans)
    assert LENGTHS[plans[0].shortest] == LENGTHS[:5].min()
