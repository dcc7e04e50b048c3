"""Weighted sums of objectives: values, incentives, what they need, and lists in configs."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from pairs import assert_close, assert_finite, batch, outputs

from fastpref import losses
from fastpref.logps import SequenceLogps
from fastpref.losses.anchored import NCAPair
from fastpref.losses.base import PairwiseLoss
from fastpref.losses.batchwise import AOT
from fastpref.losses.combined import WeightedSum, build_combined, config_of
from fastpref.losses.margin import DPO, IPO, PMO
from fastpref.losses.normalized import CPO, SFT, CPOSimPO, SimPO
from fastpref.losses.token_level import TDPO2
from fastpref.losses.wrappers import WPO, LabelSmoothing, build_with_options

SUMS = [
    WeightedSum(((DPO(), 0.8), (SFT(), 0.2))),
    WeightedSum(((SFT(average=False), 0.1), (IPO(tau=0.3), 2), (NCAPair(), 1.5))),
    WeightedSum(((SimPO(), 3.0),)),
]
every_sum = pytest.mark.parametrize("objective", SUMS, ids=lambda objective: objective.name)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


@every_sum
@hard_and_soft
def test_losses_and_incentives_add_up(objective, soft):
    policy, reference = batch(soft=soft)
    parts = [weight * outputs(part, policy, reference) for part, weight in objective.parts]
    assert_close(outputs(objective, policy, reference), torch.stack(parts).sum(0), 1e-12)


@every_sum
def test_rewards_are_those_of_the_first(objective):
    policy, reference = batch()
    first = objective.parts[0][0](policy, reference)
    out = objective(policy, reference)
    assert torch.equal(out.chosen_rewards, first.chosen_rewards)
    assert torch.equal(out.rejected_rewards, first.rejected_rewards)


@hard_and_soft
@pytest.mark.parametrize(
    ("objective", "same"),
    [
        # DPO without a reference and the likelihood of the chosen response.
        (
            WeightedSum(((PMO(alpha=0.3, beta=0), 1), (SFT(average=False), 0.7))),
            CPO(beta=0.3, lam=0.7),
        ),
        (
            WeightedSum(((SimPO(beta=2.0, gamma=0.5), 1), (SFT(), 0.7))),
            CPOSimPO(beta=2.0, gamma=0.5, lam=0.7),
        ),
        (WeightedSum(((DPO(beta=0.3), 0.25), (DPO(beta=0.3), 0.75))), DPO(beta=0.3)),
        (WeightedSum(((IPO(), 1),)), IPO()),
    ],
    ids=lambda objective: objective.name,
)
def test_special_cases(objective, same, soft):
    policy, reference = batch(soft=soft)
    assert_close(outputs(objective, policy, reference), outputs(same, policy, reference), 1e-12)
    assert objective.needs_reference == same.needs_reference


@dataclasses.dataclass(frozen=True)
class Tell(PairwiseLoss):
    """Needs no reference, and tells which one it got."""

    name: ClassVar[str] = "tell"
    needs_reference: ClassVar[bool] = False

    def reward(self, logps, lengths, reference):
        return reference

    def hard_loss(self, policy, reference):
        return reference.chosen + reference.rejected


def test_a_part_that_needs_no_reference_sees_none():
    policy, reference = batch()
    nan = dataclasses.replace(reference, chosen=reference.chosen * math.nan)
    free = WeightedSum(((SFT(), 1), (SimPO(), 1)))
    assert not free.needs_reference
    assert torch.equal(free(policy, nan).loss, free(policy).loss)
    mixed = WeightedSum(((Tell(), 1), (DPO(), 1)))
    assert mixed.needs_reference
    out = mixed(policy, reference)
    assert torch.equal(out.loss, DPO()(policy, reference).loss)
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()


def test_a_missing_reference_names_the_sum():
    policy, _ = batch()
    with pytest.raises(ValueError, match=r"reference: 0\.8 dpo \+ 0\.2 sft needs"):
        SUMS[0](policy)


def test_soft_labels_are_taken_if_all_parts_take_them():
    assert SUMS[0].soft_labels
    mixed = WeightedSum(((DPO(), 1), (AOT(), 1)))
    assert not mixed.soft_labels
    policy, reference = batch(soft=True)
    with pytest.raises(ValueError, match=r"preference: 1 dpo \+ 1 aot does not take soft labels"):
        mixed(policy, reference)


@every_sum
def test_everything_is_finite(objective):
    assert_finite(objective)


@every_sum
def test_nothing_waits_for_the_device(objective):
    policy, reference = (
        SequenceLogps.from_sequences(
            torch.empty(8, device="meta"),
            torch.empty(8, dtype=torch.int64, device="meta"),
            torch.empty(4, device="meta"),
        )
        for _ in range(2)
    )
    assert objective(policy, reference).loss.shape == (4,)


def test_a_sum_can_be_wrapped():
    policy, reference = batch()
    smooth = LabelSmoothing(SUMS[0], 0.2)
    expected = [
        weight * outputs(LabelSmoothing(part, 0.2), policy, reference)
        for part, weight in SUMS[0].parts
    ]
    assert_close(outputs(smooth, policy, reference), torch.stack(expected).sum(0), 1e-12)
    assert WPO(SUMS[0]).name == "(0.8 dpo + 0.2 sft)(wpo=sampled)"


def test_build_combined_makes_each_item():
    items = [{"name": "dpo", "weight": 0.8}, {"name": "sft", "average": False}]
    built = build_combined(items, losses.build)
    assert built == WeightedSum(((DPO(), 0.8), (SFT(average=False), 1.0)))
    assert built.name == "0.8 dpo + 1 sft"
    assert items[0] == {"name": "dpo", "weight": 0.8}  # what was given stays as it was


def options(name, **parameters):
    kind = {"dpo": DPO, "sft": SFT, "tdpo2": TDPO2}[name]
    return build_with_options(kind, parameters)


@pytest.mark.parametrize(
    "items",
    [
        [{"name": "dpo", "weight": 0.8, "beta": 0.3}, {"name": "sft", "weight": 0.2}],
        [{"name": "dpo", "weight": 1, "label_smoothing": 0.1, "f_divergence": "js"}],
    ],
)
def test_config_of_builds_it_again(items):
    built = build_combined(items, options)
    config = config_of(built)
    assert build_combined(config, options) == built
    for item, entry in zip(items, config, strict=True):
        assert item.items() <= entry.items() and list(entry)[:2] == ["name", "weight"]
    assert config_of(DPO(beta=0.3)) == {"name": "dpo", "beta": 0.3}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"loss: expected a list such as .*, got \[\]"),
        ({"name": "dpo"}, "loss: expected a list such as .*, got {'name': 'dpo'}"),
        (["dpo"], r"loss\[0\]: expected e\.g\. .*, got 'dpo'"),
        ([{"name": "dpo"}, {"weight": 1}], r"loss\[1\]\.name: is missing"),
        ([{"name": "dpo"}, {"name": "sf"}], r"loss\[1\]\.name: no objective is called 'sf'"),
        ([{"name": "dpo", "beta": 0}], r"loss\[0\]\.beta: must be > 0, got 0"),
        ([{"name": "sft", "beta": 0.1}], r"loss\[0\]\.beta: not a parameter of sft"),
        ([{"name": "dpo"}, {"name": "sft", "weight": 0}], r"loss\[1\]\.weight: must be > 0, got 0"),
        ([{"name": "dpo", "weight": -1}], r"loss\[0\]\.weight: must be > 0, got -1"),
        ([{"name": "dpo", "weight": math.inf}], r"loss\[0\]\.weight: must be finite, got inf"),
        ([{"name": "dpo", "weight": "1"}], r"loss\[0\]\.weight: must be a number, got '1'"),
        ([{"name": "dpo", "weight": None}], r"loss\[0\]\.weight: must be a number, got None"),
    ],
)
def test_bad_lists_are_refused_by_item(items, message):
    with pytest.raises(ValueError, match=message):
        build_combined(items, losses.build)


@pytest.mark.parametrize("item", [{"name": "tdpo2"}, {"name": "dpo", "wpo": True}], ids=str)
def test_only_pairwise_objectives_add_up(item):
    with pytest.raises(ValueError, match=r"loss\[1\]\.name: .* only those can be added up"):
        build_combined([{"name": "sft"}, item], options)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="parts: expected at least one"):
        WeightedSum(())
    with pytest.raises(ValueError, match=r"parts\[1\]\.weight: must be > 0"):
        WeightedSum(((DPO(), 1), (SFT(), 0)))
    with pytest.raises(ValueError, match=r"parts\[0\]\.name: tdpo2 is not an objective on pairs"):
        WeightedSum(((TDPO2(), 1),))
