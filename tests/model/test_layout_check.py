"""Relative errors of hidden states."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref.model.layout_check import relative_error


def test_the_largest_error_counts() -> None:
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    states = torch.tensor([[3.0, 4.5], [1.25, 0.0]])
    assert relative_error(states, expected) == 0.25


def test_a_hidden_state_of_zeros_equals_itself() -> None:
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert relative_error(states, states) == 0.0
    assert relative_error(states[:1], states[:1]) == 0.0
    assert relative_error(states + 1e-3, states) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_not_finite_is_no_agreement(dtype: torch.dtype) -> None:
    expected = torch.ones(20, 2, dtype=dtype)
    states = expected.clone()
    states[3, 1] = math.nan
    assert not relative_error(states, expected) <= 0.1


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1.0), (torch.bfloat16, 0.0)])
def test_in_half_precision_one_token_of_twenty_may_differ(dtype: torch.dtype, error: float) -> None:
    expected = torch.ones(20, 2, dtype=dtype)
    states = expected.clone()
    states[3] = 2
    assert relative_error(states, expected) == error
