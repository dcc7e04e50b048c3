"""Reward Calibration by the statistics of a batch: factor, clip, averages and state."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref import losses
from fastpref.dynamics.reward_calibration import (
    CALIBRATION_METRICS,
    BatchStatistics,
    RewardCalibration,
    calibrated,
)
from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.ops import ScoreGeometry
from tests.helpers.pairs import batch


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def step(
    d_w: float, d_l: float, s_w: float = 1.0, s_l: float = 1.0, cosine: float = 0.0
) -> BatchStatistics:
    geometry = ScoreGeometry(number(s_w), number(s_l), number(cosine))
    return BatchStatistics(number(d_w), number(d_l), geometry)


def test_the_ratio_becomes_that_of_the_norms_and_the_product_stays() -> None:
    """Proposition 3.4, for a batch in a steady state."""
    calibration = RewardCalibration(eps=1e-300)
    calibration.update(step(0.3, 0.002, s_w=5.0, s_l=11.0))
    factor, (log_factor, clipped) = calibration.factor()
    assert 0.3 * factor / (0.002 / factor) == pytest.approx(11 / 5, rel=1e-14)
    assert log_factor == pytest.approx(math.log(factor), rel=1e-14) and clipped == 0


def test_decided_pairs_do_not_rule_the_factor() -> None:
    """d_l of a decided pair is e^-large: it vanishes in a mean, and rules a mean of logarithms."""
    pairs = torch.tensor([[1.0, 1.0], [1.0, 1e-40]], dtype=torch.float64)  # d_w, d_l of each
    sums = torch.cat([pairs.sum(0), number(2.0)[None]])
    scores = torch.ones(2, 3, 4, dtype=torch.float64)
    calibration = RewardCalibration()
    calibration.update(BatchStatistics.of_sums(sums, scores))
    log_r, log_r_star = calibration.log_ratios()
    assert log_r == pytest.approx(math.log(2), rel=1e-11)  # not log(1e40) / 2
    assert log_r_star == 0


@pytest.mark.parametrize(
    ("log_r", "cosine", "gap"),
    [
        (0.0, 0.5, 0.6),  # 0 + 0.6 is within log 2 of 1
        (-3.0, 0.5, 1 - math.log(2) + 3),  # far below: up to the lower edge
        (0.0, 1.0, 1.0),  # at rho = 1 the band is its middle
        (1.0, 0.9, 1 - 1 - math.log(0.9)),  # 1 + 0.6 is above: down to the upper edge
        (3.0, -0.2, 0.6),  # rho < 0: no edges
    ],
)
@pytest.mark.parametrize("known", [False, True], ids=["the last step's", "its own"])
def test_the_clip_leaves_the_batch_on_the_edge_of_its_band(log_r, cosine, gap, known) -> None:
    """Eq. 64, with E[log r] = 0.4 and E[log r*] = 1, so that 2 log A = 0.6 without a clip."""
    calibration = RewardCalibration()
    statistics = step(math.exp(log_r), 1.0, cosine=cosine)
    averages = torch.tensor([0.4, 0.0, -0.5, 0.5], dtype=torch.float64)
    last = torch.tensor([100.0, 0.1] if known else [log_r, cosine], dtype=torch.float64)
    calibration.load_state_dict({"averages": averages, "last": last})
    factor, (log_factor, clipped) = calibration.factor(statistics if known else None)
    assert 2 * log_factor == pytest.approx(gap, abs=1e-14) and log_factor.exp() == factor
    assert clipped == (gap != 0.6)
    assert abs(log_r + gap - 1) <= -math.log(max(cosine, 1e-9)) + 1e-14


def test_averages_start_at_the_first_step_and_forget_by_the_momentum() -> None:
    calibration = RewardCalibration(momentum=0.75)
    steps = torch.exp(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())
    for values in steps:
        left_out = calibration.update(step(*values.tolist()))
        assert not left_out
    first, second, third, fourth = (steps + 1e-12).log()
    expected = 0.75**3 * first + 0.25 * (0.75**2 * second + 0.75 * third + fourth)
    torch.testing.assert_close(calibration.averages, expected, rtol=1e-14, atol=1e-14)


def test_nothing_is_calibrated_before_the_first_step() -> None:
    calibration = RewardCalibration()
    for statistics in (None, step(1.0, 3.0, cosine=0.9)):
        factor, counts = calibration.factor(statistics)
        assert factor == 1 and counts.tolist() == [0, 0]
    sums = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert calibration.metrics(sums)["calibration/log_r"].isnan()


@pytest.mark.parametrize(
    "values",
    [(-0.1, 1, 1, 1), (0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, math.nan),
     (math.inf, 1, 1, 1)],
)  # fmt: skip
def test_a_step_without_logarithms_is_left_out_and_its_factor_is_1(values) -> None:
    calibration = RewardCalibration()
    calibration.update(step(2.0, 1.0))
    averages = calibration.averages.clone()
    assert calibration.factor()[0] < 1
    statistics = step(*values)
    assert calibration.factor(statistics)[0] == 1
    assert calibration.update(statistics)
    assert torch.equal(calibration.averages, averages)
    assert calibration.factor()[0] == 1
    assert not calibration.update(step(2.0, 1.0))
    assert calibration.factor()[0] < 1


def test_metrics_are_means_over_steps() -> None:
    calibration = RewardCalibration()
    calibration.update(step(2.0, 1.0, s_w=1.0, s_l=3.0))
    # Four steps, of which one is left out and two are clipped; the sum of log A is 2.
    values = calibration.metrics(torch.tensor([4.0, 1.0, 2.0, 2.0], dtype=torch.float64))
    assert tuple(values) == CALIBRATION_METRICS
    assert [x.item() for x in values.values()] == pytest.approx(
        [math.exp(0.5), 0.5, 0.25, math.log(2), math.log(3)], rel=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_do_not_change_in_any_bit(dtype) -> None:
    values = torch.cat([-torch.logspace(-40, 6, 300, dtype=dtype), torch.zeros(2, dtype=dtype)])
    policy = SequenceLogps.from_sequences(values.requires_grad_(), torch.ones(302))
    for factor in (torch.tensor(3.0), torch.logspace(-12, 12, 151, dtype=torch.float64)):
        scaled = calibrated(policy, factor)
        assert scaled.chosen.dtype == dtype
        assert torch.equal(scaled.chosen, policy.chosen)
        assert torch.equal(scaled.rejected, policy.rejected)
    loss = scaled.chosen.sum() + scaled.rejected.sum()
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.cat([factor, 1 / factor]).to(dtype))


def test_loss_and_rewards_are_those_without_calibration() -> None:
    objective = losses.build("simpo")
    policy, reference = batch(pairs=8)
    ours, plain = (
        objective(calibrated(policy, number(0.7)), reference),
        objective(policy, reference),
    )
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.chosen_rewards, plain.chosen_rewards)


@pytest.mark.parametrize("factors", [[2.0, 5.0], [2.0]], ids=["of each pair", "of the batch"])
def test_of_token_log_probs_only_the_gradient_is_scaled(factors) -> None:
    logps = torch.linspace(-3, -1, 7, dtype=torch.float64, requires_grad=True)
    kl = torch.rand(7, dtype=torch.float64, requires_grad=True)
    tokens = TokenLogps(logps, torch.tensor([0, 2, 2, 3, 7]), kl=kl)  # chosen_1 is empty
    factor = torch.tensor(factors, dtype=torch.float64)
    scaled = calibrated(tokens, factor if len(factors) == 2 else factor[0])
    assert torch.equal(scaled.logps, logps)
    (scaled.logps.sum() + scaled.kl.sum()).backward()
    second = 1 / factors[-1]
    assert logps.grad.tolist() == [2.0, 2.0, 0.5, second, second, second, second]
    assert kl.grad.tolist() == [1.0] * 7


def test_the_state_continues_to_the_same_bit() -> None:
    first, second = RewardCalibration(), RewardCalibration()
    first.update(step(0.3, 0.1, s_l=2.0, cosine=0.4))
    state = first.state_dict()
    second.load_state_dict(state)
    for calibration in (first, second):
        calibration.update(step(0.2, 0.7, s_l=3.0, cosine=0.9))
    assert torch.equal(first.averages, second.averages) and torch.equal(first.last, second.last)
    assert first.factor()[0] == second.factor()[0]
    assert not torch.equal(state["averages"], first.averages)  # not changed by `update`


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state: expected float64 averages of shape \(4,\), got none"),
        ({"averages": torch.zeros(4)}, r"averages of shape \(4,\), got torch.float32"),
        (
            {"averages": torch.zeros(4, dtype=torch.float64)},
            r"state: expected float64 last of shape \(2,\), got none",
        ),
    ],
)
def test_another_state_is_refused(state, message) -> None:
    with pytest.raises(ValueError, match=message):
        RewardCalibration().load_state_dict(state)


def test_parameters_out_of_range_are_refused() -> None:
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="momentum: must be >= 0 and < 1"):
            RewardCalibration(momentum)
    with pytest.raises(ValueError, match="eps: must be > 0"):
        RewardCalibration(eps=0.0)


def test_nothing_is_read_from_the_device() -> None:
    """A tensor on the meta device has no values: reading one raises."""
    calibration = RewardCalibration(device="meta")
    sums, scores = torch.empty(3, device="meta"), torch.empty(2, 5, 7, device="meta")
    statistics = BatchStatistics.of_sums(sums, scores)
    factor, _ = calibration.factor(statistics)
    left_out = calibration.update(statistics)
    assert factor.shape == left_out.shape == ()
    assert calibration.metrics(torch.empty(4, device="meta"))["calibration/factor"].shape == ()
