"""Advantages against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from fastpref.online.advantages import Scale, gae, group_normalized, leave_one_out, whiten

REWARDS = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 3, 5])


def test_gae_goes_back_from_the_last_token_of_each_response() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    offsets = torch.tensor([0, 3, 4])
    advantages, returns = gae(rewards, values, offsets, gamma=0.5, lam=0.8)
    last = 1 - 0.125
    middle = 0.5 * 0.125 - 0.25 + 0.4 * last
    first = 0.5 * 0.25 - 0.5 + 0.4 * middle
    expected = torch.tensor([first, middle, last, 1.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(returns, expected + values, rtol=0, atol=1e-15)


def test_gae_with_gamma_and_lambda_1_is_the_rest_of_the_rewards_less_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([0, 1, 9]), 1.0, 1.0)
    rest = torch.cat([rewards[:1], rewards[1:].flip(0).cumsum(0).flip(0)])
    torch.testing.assert_close(returns, rest, rtol=0, atol=1e-14)
    torch.testing.assert_close(advantages, rest - values, rtol=0, atol=1e-14)


def test_gae_of_no_responses_is_empty() -> None:
    empty = torch.zeros(0)
    assert gae(empty, empty, torch.tensor([0]))[0].shape == (0,)


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    expected = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    whitened = whiten(torch.tensor([2.0, 5.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(whitened, expected, rtol=0, atol=1e-8)
    assert whiten(torch.tensor([7.0])).tolist() == [0.0]


def test_leave_one_out_compares_with_the_others_of_the_group() -> None:
    assert leave_one_out(REWARDS, GROUPS).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0]


def test_group_advantages_by_scale() -> None:
    centered = [-2.0, -1.0, 3.0, 0.0, 0.0]
    assert group_normalized(REWARDS, GROUPS, "none").tolist() == centered
    by_group = [c / (7**0.5 + 1e-4) for c in centered[:3]] + [0.0, 0.0]
    assert group_normalized(REWARDS, GROUPS).tolist() == pytest.approx(by_group, abs=1e-14)
    deviation = REWARDS.std().item() + 1e-4
    by_batch = [c / deviation for c in centered]
    assert group_normalized(REWARDS, GROUPS, "batch").tolist() == pytest.approx(by_batch, abs=1e-14)


def test_a_group_of_one_and_an_unknown_scale_are_refused() -> None:
    for function in (leave_one_out, group_normalized):
        with pytest.raises(ValueError, match="sample at least 2 responses for each prompt"):
            function(REWARDS, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="scale: expected 'group', 'batch' or 'none', got 'std'"):
        group_normalized(REWARDS, GROUPS, "std")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_of_any_size_have_advantages_0(scale: Scale) -> None:
    """The mean of three times 1000.1 in fp32 differs from it by 6e-5, more than half of STD_EPS."""
    for reward in (0.1, 7.3, 1000.1, -123456.7):
        advantages = group_normalized(torch.full((3,), reward), torch.tensor([0, 3]), scale)
        assert advantages.abs().max().item() < 1e-5
        assert whiten(torch.full((3,), reward)).abs().max().item() < 1e-5
