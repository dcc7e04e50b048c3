"""Sequence log-probs: splitting, validation, swapping, and the mean of an empty response."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastpref.logps import SequenceLogps, mean_logps


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
    # -7 with length 0 cannot come from a sum of tokens: it shows that the value is not read.
    logps = torch.tensor([-6.0, -7.0, -5.0], dtype=dtype, requires_grad=True)
    mean = mean_logps(logps, torch.tensor([3, 0, 1]))
    mean.sum().backward()
    assert mean.dtype == dtype
    assert mean.tolist() == [-2.0, 0.0, -5.0]
    assert logps.grad.tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    assert logps.grad[1] == 0
