"""Weighted sums of objectives: values, incentives, what they need, and lists in configs."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

from fastpref import losses
from fastpref.logps import SequenceLogps
from fastpref.losses.anchored import NCAPair
from fastpref.losses.base import PairwiseLoss
from fastpref.losses.batchwise import AOT
from fastpref.losses.combined import TokenLevelSum, WeightedSum, build_combined, config_of
from fastpref.losses.margin import DPO, IPO, PMO
from fastpref.losses.normalized import CPO, SFT, CPOSimPO, SimPO
from fastpref.losses.token_level import TDPO2, TIDPO, token_incentives
from fastpref.losses.wrappers import WPO, LabelSmoothing, LengthDesensitized, TokenWeighted
from tests.helpers.pairs import assert_close, assert_finite, batch, outputs
from tests.helpers.token_pairs import on_meta, token_batch, without

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


# Sums of which a part looks at tokens

MIXED = [
    {"name": "tdpo2", "weight": 0.5},
    {"name": "sft", "weight": 0.2},
    {"name": "dpo", "ld_alpha": 0.5, "wpo": True},
]


def built_from(*items):
    return losses.from_config(list(items))


def test_one_part_that_looks_at_tokens_makes_a_sum_that_does():
    assert built_from(*MIXED) == TokenLevelSum(
        (
            (TDPO2(), 0.5),
            (TokenWeighted(SFT()), 0.2),
            (WPO(LengthDesensitized(DPO(), 0.5)), 1.0),
        )
    )
    assert built_from(*MIXED).name == "0.5 tdpo2 + 0.2 sft + 1 dpo(ld_alpha=0.5)(wpo=sampled)"
    assert built_from({"name": "tdpo2"}) == TokenLevelSum(((TDPO2(), 1.0),))
    assert isinstance(built_from({"name": "dpo"}, {"name": "sft"}), WeightedSum)


@hard_and_soft
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
def test_token_level_losses_and_incentives_add_up(soft, weights):
    policy, reference = token_batch(soft, weights=weights)
    # A pairwise part sees the sums of log-probs weighted as in the data.
    sft = SFT()(policy.sequences(policy.weights))
    alone = [part(policy, reference) for part in (TDPO2(), WPO(LengthDesensitized(DPO(), 0.5)))]
    out = built_from(*MIXED)(policy, reference)
    assert_close(out.loss, 0.5 * alone[0].loss + 0.2 * sft.loss + alone[1].loss, 1e-12)
    assert torch.equal(out.chosen_rewards, alone[0].chosen_rewards)
    assert torch.equal(out.rejected_rewards, alone[0].rejected_rewards)
    pulls = [
        weight * token_incentives(part, policy, reference)
        for part, weight in built_from(*MIXED).parts
    ]
    ours = token_incentives(built_from(*MIXED), policy, reference)
    assert_close(ours, torch.stack(pulls).sum(0), 1e-12)


def test_rewards_of_a_pairwise_first_part():
    policy, reference = token_batch(weights=True)
    out = built_from({"name": "simpo"}, {"name": "tdpo1"})(policy, reference)
    expected = SimPO()(policy.sequences(policy.weights))
    assert torch.equal(out.chosen_rewards, expected.chosen_rewards)


def test_a_sum_needs_what_its_parts_need():
    policy, reference = token_batch()
    mixed = built_from(*MIXED, {"name": "ti_dpo"}, {"name": "tdpo1"})
    assert mixed.columns == ("kl", "collision_entropy", "importance")
    for column in mixed.columns:
        with pytest.raises(ValueError, match=rf"{column}: 0\.5 tdpo2 \+ .* needs"):
            mixed(without(policy, column), reference)
    with pytest.raises(ValueError, match=r"reference: 0\.5 tdpo2 \+ .* needs"):
        mixed(policy)
    free = built_from({"name": "sft", "ld_alpha": 0.5}, {"name": "simpo"})
    assert (free.columns, free.needs_reference) == ((), False)
    nan = dataclasses.replace(reference, logps=reference.logps * math.nan)
    assert torch.equal(free(policy, nan).loss, free(policy).loss)


def test_a_token_level_sum_takes_soft_labels_if_all_parts_do():
    assert built_from(*MIXED).soft_labels
    mixed = built_from({"name": "tdpo2"}, {"name": "aot"})
    assert not mixed.soft_labels
    with pytest.raises(ValueError, match="preference: aot does not take soft labels"):
        mixed(*token_batch(soft=True))


def test_a_token_level_sum_waits_for_no_device_and_stays_finite():
    meta = [on_meta(side) for side in token_batch(True, weights=True)]
    assert built_from(*MIXED)(*meta).loss.shape == (6,)
    for dtype in (torch.float32, torch.float64):
        policy, reference = token_batch(True, dtype, lengths=([4096, 0, 1], [3000, 4096, 0]))
        policy = dataclasses.replace(policy, logps=25 * policy.logps)
        incentives = token_incentives(built_from(*MIXED), policy, reference)
        out = built_from(*MIXED)(policy, reference)
        for tensor in (out.loss, out.chosen_rewards, out.rejected_rewards, incentives):
            assert tensor.dtype == dtype and tensor.isfinite().all()


# Lists in configs


@pytest.mark.parametrize(
    "items",
    [
        [{"name": "dpo", "weight": 0.8, "beta": 0.3}, {"name": "sft", "weight": 0.2}],
        [{"name": "dpo", "weight": 1, "label_smoothing": 0.1, "f_divergence": "js"}],
        [
            {"name": "tdpo2", "weight": 0.5, "alpha": 0.3},
            {"name": "ipo", "weight": 0.2, "label_smoothing": 0.1},
            {"name": "dpo", "weight": 1, "ld_alpha": 0.5, "wpo": "unaligned"},
        ],
    ],
)
def test_config_of_builds_it_again(items):
    built = build_combined(items, losses.build)
    config = config_of(built)
    assert build_combined(config, losses.build) == built
    if isinstance(built, WeightedSum):
        assert config_of(TokenWeighted(built)) == config
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


@pytest.mark.parametrize("name", ["kto", "info_nca"])
@pytest.mark.parametrize("other", ["sft", "tdpo2"])
def test_only_objectives_on_pairs_add_up(name, other):
    with pytest.raises(ValueError, match=rf"loss\[1\]\.name: {name} is not an objective on pairs"):
        build_combined([{"name": other}, {"name": name}], losses.build)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="parts: expected at least one"):
        WeightedSum(())
    with pytest.raises(ValueError, match=r"parts\[1\]\.weight: must be > 0"):
        WeightedSum(((DPO(), 1), (SFT(), 0)))
    with pytest.raises(
        ValueError, match=r"parts\[0\]: expected a PairwiseLoss, got TDPO2.*adds up"
    ):
        WeightedSum(((TDPO2(), 1),))
    with pytest.raises(ValueError, match=r"parts\[1\]: expected a TokenLevelLoss, got DPO"):
        TokenLevelSum(((TIDPO(), 1), (DPO(), 1)))
    with pytest.raises(ValueError, match=r"parts\[0\]\.weight: must be > 0"):
        TokenLevelSum(((TIDPO(), 0),))
