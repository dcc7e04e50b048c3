"""The order of an epoch over several sources: exact counts, even spread, and what repeats."""

from __future__ import annotations

import numpy as np
import pytest

from fastpref.config.sources import Source
from fastpref.data.batch_plan import Plan
from fastpref.data.mixture import Mixture, apportion
from fastpref.data.readers import DataError

SIZES = (1000, 50, 777)


def mixture(**measures: tuple[float, float, float]) -> Mixture:
    ((field, values),) = measures.items()
    sources = [
        Source(path=name, **{field: value}) for name, value in zip("abc", values, strict=True)
    ]
    return Mixture.of(sources, SIZES)


def test_shares_are_exact_and_leave_the_length_of_an_epoch() -> None:
    assert mixture(share=(0.5, 0.3, 0.2)).counts == (914, 548, 365)  # 913.5, 548.1, 365.4
    assert apportion(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert apportion(100, [0.33, 0.33, 0.33]) == [34, 33, 33]


def test_weights_are_times_an_epoch() -> None:
    assert mixture(weight=(1, 2, 0.5)).counts == (1000, 100, 388)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_stretch_of_an_epoch_has_the_ratios(epoch: int) -> None:
    mixed = mixture(share=(0.5, 0.3, 0.2))
    sources = mixed.sources_of(mixed.order(3, epoch))
    assert np.bincount(sources).tolist() == [914, 548, 365]
    taken = np.cumsum(np.eye(3)[sources], axis=0)
    expected = np.arange(1, len(mixed) + 1)[:, None] * np.array(mixed.counts) / len(mixed)
    assert np.abs(taken - expected).max() < 2
    for start in range(0, 1600, 200):  # in 200 rows, within 1 % of the rows
        part = np.bincount(sources[start : start + 200], minlength=3) / 200
        assert np.abs(part - [0.5, 0.3, 0.2]).max() <= 0.01


def test_repeated_and_cut_sources_show_all_rows_alike() -> None:
    mixed = mixture(share=(0.5, 0.3, 0.2))
    seen = np.bincount(np.concatenate([mixed.order(3, epoch) for epoch in range(4)]))
    parts = np.split(seen, [1000, 1050])
    assert [sorted(set(part.tolist())) for part in parts] == [[3, 4], [43, 44], [1, 2]]


def test_whole_sources_occur_once_an_epoch_in_another_order_each_time() -> None:
    mixed = mixture(weight=(1, 1, 1))
    orders = [mixed.order(0, epoch) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(1827)) for order in orders)
    assert (orders[0] != orders[1]).any() and (orders[0] != mixed.order(1, 0)).any()
    assert (orders[0] == mixed.order(0, 0)).all()


def test_a_plan_follows_the_mixture_and_still_covers_all_groups() -> None:
    mixed = mixture(weight=(0.1, 4, 0.1))
    costs = np.full(sum(SIZES), 7)
    plan = Plan(costs, None, 32, 4096, seed=5, mixture=mixed)
    assert plan.steps_per_epoch == -(-(100 + 200 + 78) // 32)
    steps = [index for k in range(plan.steps_per_epoch) for index in plan.groups(k)]
    assert steps == mixed.order(5, 0).tolist()
    assert sorted({i for step in plan.coverage() for i in step}) == list(range(sum(SIZES)))
    alone = Plan(costs, None, 32, 4096, seed=None, mixture=None)
    assert [i for step in alone.coverage() for i in step] == list(range(sum(SIZES)))


def test_a_source_of_which_an_epoch_has_nothing_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"data.train: b is so small a part that an epoch has none of its 50 groups; raise "
        r"its weight or share",
    ):
        mixture(weight=(1, 0.005, 1))
