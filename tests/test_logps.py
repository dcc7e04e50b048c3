"""Sequence log-probs: splitting, validation, swapping, and the mean of an empty response."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastpref.logps import (
    GroupedLogps,
    SequenceLogps,
    TokenLogps,
    UnpairedLogps,
    mean_logps,
    segment_positions,
)


def three_pairs(preference: torch.Tensor | None = None) -> SequenceLogps:
    logps = torch.tensor([-1.0, -2.0, -3.0, -10.0, -20.0, -30.0], requires_grad=True)
    return SequenceLogps.from_sequences(logps, torch.tensor([1, 2, 3, 4, 5, 6]), preference)


def test_from_sequences_takes_all_chosen_then_all_rejected():
    pairs = three_pairs(torch.tensor([0.2, 0.5, 1.0]))
    assert pairs.chosen.tolist() == [-1.0, -2.0, -3.0]
    assert pairs.rejected.tolist() == [-10.0, -20.0, -30.0]
    assert pairs.chosen_lengths.tolist() == [1, 2, 3]
    assert pairs.rejected_lengths.tolist() == [4, 5, 6]
    assert pairs.preference.tolist() == pytest.approx([0.2, 0.5, 1.0])


def test_from_sequences_keeps_the_gradient():
    logps = torch.arange(4.0, requires_grad=True)
    pairs = SequenceLogps.from_sequences(logps, torch.ones(4))
    (pairs.chosen.sum() - 2 * pairs.rejected.sum()).backward()
    assert logps.grad.tolist() == [1, 1, -2, -2]


def test_from_sequences_accepts_a_batch_without_pairs():
    assert SequenceLogps.from_sequences(torch.empty(0), torch.empty(0)).chosen.shape == (0,)


@pytest.mark.parametrize(
    ("logps", "lengths", "preference", "message"),
    [
        (torch.zeros(3), torch.ones(3), None, r"logps: expected shape \(2B,\).*\(3,\)"),
        (torch.zeros(2, 2), torch.ones(2, 2), None, r"logps: expected shape.*\(2, 2\)"),
        (torch.zeros(4).bfloat16(), torch.ones(4), None, "logps: expected float32.*bfloat16"),
        (torch.zeros(4), torch.ones(2), None, r"lengths: expected shape \(4,\).*\(2,\)"),
        (torch.zeros(4), torch.ones(4), torch.ones(4), r"preference: expected shape \(2,\).*\(4,"),
        (torch.zeros(4), torch.ones(4), torch.ones(1), r"preference: expected shape \(2,\).*\(1,"),
    ],
)
def test_from_sequences_names_the_wrong_argument(logps, lengths, preference, message):
    with pytest.raises(ValueError, match=message):
        SequenceLogps.from_sequences(logps, lengths, preference)


def test_swapped_exchanges_everything_and_complements_the_label():
    pairs = three_pairs(torch.tensor([0.25, 0.5, 1.0]))
    swapped = pairs.swapped()
    assert swapped.chosen is pairs.rejected and swapped.rejected is pairs.chosen
    assert swapped.chosen_lengths is pairs.rejected_lengths
    assert swapped.rejected_lengths is pairs.chosen_lengths
    assert swapped.preference.tolist() == [0.75, 0.5, 0.0]
    assert torch.equal(swapped.swapped().preference, pairs.preference)


def test_swapped_keeps_a_hard_label_hard():
    assert three_pairs().swapped().preference is None


def test_detach_keeps_values_and_drops_the_graph():
    pairs = three_pairs(torch.tensor([0.2, 0.5, 1.0]))
    detached = pairs.detach()
    assert pairs.chosen.requires_grad and pairs.rejected.requires_grad
    assert not detached.chosen.requires_grad and not detached.rejected.requires_grad
    assert torch.equal(detached.chosen, pairs.chosen)
    assert torch.equal(detached.rejected, pairs.rejected)
    assert detached.chosen_lengths is pairs.chosen_lengths
    assert detached.preference is pairs.preference


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        three_pairs().chosen = torch.zeros(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_logps_of_an_empty_response_is_zero_with_zero_gradient(dtype):
    # A sum over no tokens cannot be -7: the value shows that it is not read.
    logps = torch.tensor([-6.0, -7.0, -5.0], dtype=dtype, requires_grad=True)
    mean = mean_logps(logps, torch.tensor([3, 0, 1]))
    mean.sum().backward()
    assert mean.dtype == dtype
    assert mean.tolist() == [-2.0, 0.0, -5.0]
    assert logps.grad.tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    assert logps.grad[1] == 0


def unpaired(size: int = 3, **changes: torch.Tensor) -> UnpairedLogps:
    label = torch.arange(size) % 2 == 0
    fields = {"logps": -torch.arange(1.0, size + 1), "lengths": torch.ones(size)}
    return UnpairedLogps(**{**fields, "desirable": label, **changes})


def grouped(*sizes: int, **changes: torch.Tensor) -> GroupedLogps:
    logps = -torch.arange(1.0, sum(sizes) + 1)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    fields = {"logps": logps, "lengths": torch.ones_like(logps), "cu_groups": cu, "scores": -logps}
    return GroupedLogps(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logps": torch.zeros(3, 1)}, r"logps: expected shape \(S,\).*\(3, 1\)"),
        ({"logps": torch.zeros(3).half()}, "logps: expected float32 or float64.*float16"),
        ({"lengths": torch.ones(2)}, r"lengths: expected shape \(3,\).*\(2,\)"),
    ],
)
def test_responses_name_the_wrong_argument(changes, message):
    for make in (unpaired, grouped):
        with pytest.raises(ValueError, match=message):
            make(3, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desirable": torch.ones(2, dtype=torch.bool)}, r"desirable: expected shape \(3,\).*\(2"),
        ({"desirable": torch.ones(3)}, "desirable: expected bool, got torch.float32; compare"),
    ],
)
def test_unpaired_names_the_wrong_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        unpaired(3, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.ones(4)}, r"scores: expected shape \(3,\).*\(4,\)"),
        ({"scores": torch.ones(3, dtype=torch.int64)}, "scores: expected floating.*int64"),
        ({"cu_groups": torch.tensor(3)}, r"cu_groups: expected shape \(G \+ 1,\).*got \(\)"),
        ({"cu_groups": torch.tensor([], dtype=torch.int64)}, r"cu_groups: expected.*got \(0,\)"),
        ({"cu_groups": torch.tensor([0.0, 3.0])}, "cu_groups: expected int32 or int64.*float32"),
    ],
)
def test_grouped_names_the_wrong_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        grouped(3, **changes)


def test_cat_of_unpaired_keeps_the_order():
    first, second = unpaired(2), unpaired(3, logps=torch.tensor([-7.0, -8.0, -9.0]))
    both = UnpairedLogps.cat(iter([first, second]))
    assert both.logps.tolist() == [-1, -2, -7, -8, -9]
    assert both.desirable.tolist() == [True, False, True, False, True]
    assert both.lengths.shape == (5,)


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_cat_of_grouped_moves_the_offsets(offsets):
    parts = [grouped(2, 1), grouped(), grouped(0, 3), grouped(0)]
    parts = [dataclasses.replace(x, cu_groups=x.cu_groups.to(offsets)) for x in parts]
    whole = GroupedLogps.cat(iter(parts))
    assert whole.cu_groups.tolist() == [0, 2, 3, 3, 6, 6] and whole.cu_groups.dtype == offsets
    assert whole.logps.tolist() == [-1, -2, -3, -1, -2, -3]
    assert whole.scores.tolist() == [1, 2, 3, 1, 2, 3]
    assert torch.equal(GroupedLogps.cat([whole]).cu_groups, whole.cu_groups)


def test_cat_and_detach_of_responses_keep_and_drop_the_graph():
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    for kind, one in ((UnpairedLogps, unpaired(logps=logps)), (GroupedLogps, grouped(3))):
        one = dataclasses.replace(one, logps=logps)
        assert kind.cat([one, one]).logps.requires_grad
        detached = one.detach()
        assert not detached.logps.requires_grad and torch.equal(detached.logps, logps)
        assert detached.lengths is one.lengths
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.logps = logps


def test_responses_can_be_none_at_all():
    assert unpaired(0).logps.shape == (0,)
    assert grouped().cu_groups.tolist() == [0]


def tokens(*lengths: int, **changes: torch.Tensor) -> TokenLogps:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    fields = {"logps": -torch.arange(1.0, sum(lengths) + 1), "cu_seqlens": offsets}
    return TokenLogps(**{**fields, **changes})


def test_tokens_sum_to_sequences():
    label = torch.tensor([0.2, 0.7])
    pairs = tokens(1, 0, 2, 1, preference=label).sequences()
    assert pairs.chosen.tolist() == [-1, 0] and pairs.rejected.tolist() == [-5, -4]
    assert pairs.chosen_lengths.tolist() == [1, 0] and pairs.rejected_lengths.tolist() == [2, 1]
    assert pairs.preference is label
    # Only the weights of the argument apply; the caller passes those of the data.
    weighted = tokens(1, 0, 2, 1, weights=torch.ones(4)).sequences(torch.tensor([2.0, 0, 1, 3]))
    assert weighted.chosen.tolist() == [-2, 0] and weighted.rejected.tolist() == [-3, -12]
    assert weighted.rejected_lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logps": torch.zeros(3, 1)}, r"logps: expected shape \(T,\).*\(3, 1\)"),
        ({"logps": torch.zeros(3).bfloat16()}, "logps: expected float32 or float64.*bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens: expected shape \(2B \+ 1,\).*\(2,\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"cu_seqlens: expected.*\(0,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 1, 3])}, "cu_seqlens: expected int32 or int64.*float32"),
        ({"preference": torch.ones(2)}, r"preference: expected shape \(1,\).*\(2,\)"),
        ({"kl": torch.zeros(2)}, r"kl: expected shape \(3,\), one per token, got \(2,\)"),
        ({"weights": torch.ones(3, 1)}, r"weights: expected shape \(3,\)"),
        ({"weights": torch.ones(3, dtype=torch.int64)}, "weights: expected floating.*int64"),
        ({"importance": torch.ones(4)}, r"importance: expected shape \(3,\)"),
        ({"collision_entropy": torch.ones(4)}, r"collision_entropy: expected shape \(3,\)"),
    ],
)
def test_tokens_name_the_wrong_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        tokens(1, 2, **changes)


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_cat_of_tokens_puts_all_chosen_responses_first(offsets):
    first = tokens(1, 2, 1, 0, preference=torch.tensor([0.1, 0.2]))
    second = tokens(2, 1, logps=torch.tensor([-10.0, -20, -30]), preference=torch.tensor([0.3]))
    parts = [
        dataclasses.replace(part, cu_seqlens=part.cu_seqlens.to(offsets), kl=10 * part.logps)
        for part in (first, tokens(preference=torch.zeros(0)), second)
    ]
    whole = TokenLogps.cat(iter(parts))
    assert whole.logps.tolist() == [-1, -2, -3, -10, -20, -4, -30]
    assert whole.cu_seqlens.tolist() == [0, 1, 3, 5, 6, 6, 7] and whole.cu_seqlens.dtype == offsets
    assert torch.equal(whole.kl, 10 * whole.logps) and whole.weights is None
    assert torch.equal(whole.preference, torch.tensor([0.1, 0.2, 0.3]))
    one = TokenLogps.cat([first])
    assert torch.equal(one.logps, first.logps) and torch.equal(one.cu_seqlens, first.cu_seqlens)


def test_cat_of_tokens_refuses_a_column_of_some_parts():
    for name in ("weights", "kl", "importance", "collision_entropy"):
        with pytest.raises(ValueError, match=f"{name}: expected for every part or for none"):
            TokenLogps.cat([tokens(1, 2), tokens(1, 2, **{name: torch.ones(3)})])


def test_cat_and_detach_of_tokens_keep_and_drop_the_graph():
    grown = torch.tensor([-1.0, -2, -3], requires_grad=True)
    one = tokens(1, 2, logps=grown, kl=grown.square(), weights=torch.ones(3))
    both = TokenLogps.cat([one, one])
    assert both.logps.requires_grad and both.kl.requires_grad
    detached = one.detach()
    assert not detached.logps.requires_grad and not detached.kl.requires_grad
    assert torch.equal(detached.kl, one.kl) and detached.weights is one.weights
    assert tokens(1, 2).detach().kl is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.logps = grown


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_segment_positions_count_from_the_start_of_each_segment(offsets):
    segment_ids, positions = segment_positions(torch.tensor([0, 2, 2, 5], dtype=offsets), 5)
    assert segment_ids.tolist() == [0, 0, 2, 2, 2] and positions.tolist() == [0, 1, 0, 1, 2]
    segment_ids, positions = segment_positions(torch.tensor([0], dtype=offsets), 0)
    assert segment_ids.shape == positions.shape == (0,)
