"""Calibration pair by pair: Proposition 3.4, the clip, the averages, accumulation and its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpref import losses, ops
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import (
    CALIBRATION_METRICS,
    BatchStatistics,
    RewardCalibration,
)
from fastpref.logps import SequenceLogps
from fastpref.ops import ScoreGeometry
from tests.helpers.pairs import batch

# Objectives with ratios other than 1, and all incentives positive on `batch`.
UNEQUAL = ["simpo", "cpo", "dil_bce", "simper"]


def geometry(pairs: int, cosine: float | Tensor = 0.0, seed: int = 0) -> ScoreGeometry:
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.exp(torch.randn(2, pairs, generator=g, dtype=torch.float64))
    return ScoreGeometry(chosen, rejected, torch.zeros_like(chosen) + cosine)


def incentives_after(objective, calibration, policy, reference, scores) -> tuple[Tensor, Tensor]:
    """d_w and d_l as the log-probs that the model made would receive them."""
    leaf = SequenceLogps(
        policy.chosen.clone().requires_grad_(),
        policy.rejected.clone().requires_grad_(),
        policy.chosen_lengths,
        policy.rejected_lengths,
    )
    incentives = losses.incentives(objective, policy, reference)
    out = calibration.calibrate(leaf, incentives, scores)
    objective(out.policy, reference).loss.sum().backward()
    return -leaf.chosen.grad, leaf.rejected.grad


def settled(incentives, scores, eps: float = 1e-12) -> PairCalibration:
    """A calibration that has seen one step: these pairs."""
    calibration = PairCalibration(eps=eps)
    policy, _ = batch(pairs=len(incentives[0]))
    calibration.update(calibration.calibrate(policy, incentives, scores).sums)
    return calibration


@pytest.mark.parametrize("name", ["dpo", *UNEQUAL])
def test_the_ratio_becomes_that_of_the_norms_and_the_product_stays(name):
    """Proposition 3.4, for one pair in a step of its own, without the floor of the logarithms."""
    objective = losses.build(name)
    for seed in range(20):
        policy, reference = batch(pairs=1, seed=seed)
        scores = geometry(1, cosine=0.0, seed=seed)
        before = losses.incentives(objective, policy, reference)
        calibration = settled(before, scores, eps=1e-300)
        d_w, d_l = incentives_after(objective, calibration, policy, reference, scores)
        torch.testing.assert_close(
            d_w / d_l, scores.rejected_norm / scores.chosen_norm, rtol=1e-12, atol=0
        )
        torch.testing.assert_close(d_w * d_l, before[0] * before[1], rtol=1e-12, atol=0)


def test_many_pairs_share_the_ratio_of_their_geometric_means():
    objective = losses.build("cpo")
    policy, reference = batch(pairs=16)
    scores = geometry(16)
    before = losses.incentives(objective, policy, reference)
    calibration = settled(before, scores, eps=1e-300)
    d_w, d_l = incentives_after(objective, calibration, policy, reference, scores)
    factor = d_w / before[0]
    torch.testing.assert_close(factor, factor[0].expand(16), rtol=1e-12, atol=0)
    mean_gap = (d_w / d_l).log().mean() - (scores.rejected_norm / scores.chosen_norm).log().mean()
    assert abs(mean_gap) < 1e-12


def test_the_clip_leaves_each_pair_on_the_edge_of_its_band():
    """Eq. 64: the calibrated log-ratio stays within -log rho of the average log r*."""
    d_w = torch.tensor([1.0, 1.0, 1.0, 1.0, math.exp(3.0), 5.0], dtype=torch.float64)
    d_l = torch.tensor([1.0, math.exp(3.0), 1.0, math.exp(-1.0), 1.0, -5.0], dtype=torch.float64)
    rho = torch.tensor([0.5, 0.5, 1.0, 0.9, -0.2, 0.5], dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    scores = ScoreGeometry(ones, 2 * ones, rho)
    calibration = PairCalibration()
    # E[log r] = 0.4 and E[log r*] = 1, so that 2 log A = 0.6 without a clip.
    averages = torch.tensor([0.4, 0.0, -0.5, 0.5], dtype=torch.float64)
    calibration.load_state_dict({"averages": averages})
    policy, _ = batch(pairs=6)
    out = calibration.calibrate(policy, (d_w, d_l), scores)
    log2 = math.log(2)
    expected = [
        0.6,  # 0 + 0.6 is within log 2 of 1
        1 - log2 + 3,  # -3 + 0.6 is far below: up to the lower edge
        1.0,  # at rho = 1 the band is its middle
        1 - 1 - math.log(0.9),  # 1 + 0.6 is above: down to the upper edge
        0.6,  # rho < 0: no edges
        0.6,  # a negative incentive has no ratio to clip
    ]
    torch.testing.assert_close(
        2 * out.factor.log(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )
    ratio = (d_w * out.factor / (d_l / out.factor)).log()
    inside = (ratio - 1).abs() <= -rho.clamp(min=0).log() + 1e-14
    assert inside[:5].all()
    found = {name: x.item() for name, x in calibration.metrics(out.sums).items()}
    assert tuple(found) == CALIBRATION_METRICS
    assert found == pytest.approx(
        {
            "calibration/factor": math.exp(sum(expected) / 12),
            "calibration/clipped": 3 / 6,
            "calibration/left_out": 1 / 6,
            "calibration/log_r": 0.4,
            "calibration/log_r_star": 1.0,
        }
    )


def test_averages_start_at_the_first_step_and_forget_by_the_momentum():
    calibration = PairCalibration(momentum=0.75)
    policy, _ = batch(pairs=2)
    steps = []
    for seed in range(4):
        scores = geometry(2, seed=seed)
        incentives = torch.exp(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)))
        calibration.update(calibration.calibrate(policy, tuple(incentives), scores).sums)
        columns = [*incentives.double(), *scores[:2]]
        steps.append(torch.stack([(column + 1e-12).log().mean() for column in columns]))
    first, second, third, fourth = steps
    expected = 0.75**3 * first + 0.25 * (0.75**2 * second + 0.75 * third + fourth)
    torch.testing.assert_close(calibration.averages, expected, rtol=1e-14, atol=1e-14)


def test_nothing_is_calibrated_before_the_first_step_and_none_average():
    calibration = PairCalibration()
    policy, _ = batch(pairs=3)
    ones = torch.ones(3)
    out = calibration.calibrate(policy, (ones, 3 * ones), geometry(3, cosine=0.9))
    assert (out.factor == 1).all()
    found = calibration.metrics(out.sums)
    assert found["calibration/factor"] == 1 and found["calibration/clipped"] == 0
    assert found["calibration/log_r"].isnan()
    out = calibration.calibrate(policy, (-ones, 0 * ones), geometry(3))
    assert (out.factor == 1).all() and calibration.metrics(out.sums)["calibration/left_out"] == 1
    calibration.update(out.sums)
    assert calibration.averages.isnan().all()


def test_pairs_without_logarithms_are_left_out_and_counted():
    """A pair counts if it has positive, finite incentives and scores."""
    nan, inf = math.nan, math.inf
    d_w = torch.tensor([2.0, 0.0, -1.0, 1.0, 1.0, nan, inf, 1.0])
    d_l = torch.tensor([4.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    s_w = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    s_l = torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, nan])
    scores = ScoreGeometry(s_w, s_l, torch.zeros(8))
    calibration = settled((d_w, d_l), scores)
    expected = torch.tensor([2.0, 4.0, 3.0, 5.0], dtype=torch.float64).log()
    torch.testing.assert_close(calibration.averages, expected, rtol=1e-11, atol=1e-11)
    out = calibration.calibrate(batch(pairs=8)[0], (d_w, d_l), scores)
    assert calibration.metrics(out.sums)["calibration/left_out"] == 7 / 8
    # All share A = (5/3 / (2/4))^(1/2).
    expected = torch.full((8,), math.sqrt(10 / 3), dtype=torch.float64)
    torch.testing.assert_close(out.factor, expected, rtol=1e-11, atol=0)


def test_a_step_that_leaves_out_all_its_pairs_changes_nothing():
    ones = torch.ones(4)
    calibration = settled((ones, 2 * ones), geometry(4))
    before = calibration.averages.clone()
    policy, _ = batch(pairs=4)
    calibration.update(calibration.calibrate(policy, (-ones, -ones), geometry(4)).sums)
    assert torch.equal(calibration.averages, before) and before.isfinite().all()


@pytest.mark.parametrize(
    ("name", "spread"), [("ipo", 20.0), ("stapo", 2.0), ("cdpo", 40.0), ("cal_dpo", 500.0)]
)
def test_objectives_whose_incentives_change_sign(name, spread):
    """Beyond their targets they undo a pair; the common factor keeps the point where they rest."""
    objective = losses.build(name)
    policy, reference = batch(pairs=64, spread=spread)
    before = losses.incentives(objective, policy, reference)
    scores = geometry(64, cosine=0.5)
    calibration = settled(before, scores)
    out = calibration.calibrate(policy, before, scores)
    left_out = calibration.metrics(out.sums)["calibration/left_out"].item()
    negative = (torch.stack(before) <= 0).any(0)
    assert left_out == negative.double().mean() and 0 < left_out < 1
    assert calibration.averages.isfinite().all() and out.factor.isfinite().all()
    assert (out.factor[negative] == out.factor[negative][0]).all()
    after = incentives_after(objective, calibration, policy, reference, scores)
    for d, calibrated_d in zip(before, after, strict=True):
        assert torch.equal(d.sign(), calibrated_d.sign())


class Head:
    """Pairs over fixed hidden states; the head is the model. Four tokens make narrow bands."""

    D, V = 5, 4

    def __init__(self, pairs: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.pairs = pairs
        self.lengths = torch.randint(1, 6, (2, pairs), generator=g)
        tokens = int(self.lengths.sum())
        self.hidden = 1 + torch.randn(tokens, self.D, generator=g, dtype=torch.float64)
        self.labels = torch.randint(self.V, (tokens,), generator=g)
        self.start = torch.randn(self.V, self.D, generator=g, dtype=torch.float64)

    def micro_batch(self, weight, rows: slice) -> tuple[SequenceLogps, ScoreGeometry]:
        ends = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.flatten().cumsum(0)])
        index = torch.arange(self.pairs)[rows]
        sequences = torch.cat([index, index + self.pairs])
        tokens = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in sequences])
        lengths = self.lengths.flatten()[sequences]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        inputs = self.hidden[tokens], weight, self.labels[tokens]
        logps = ops.segment_sum(ops.linear_logps(*inputs, impl="reference"), offsets)
        scores = ops.score_geometry(*inputs, offsets, per_pair=True, impl="reference")
        return SequenceLogps.from_sequences(logps, lengths), scores


def train(model: Head, name: str, micro_batches: int, steps: int = 6):
    """Gradient descent, accumulated as a trainer does it."""
    objective, calibration = losses.build(name), PairCalibration(momentum=0.7)
    size = model.pairs // micro_batches
    rows = [slice(i * size, (i + 1) * size) for i in range(micro_batches)]
    references = [model.micro_batch(model.start, part)[0] for part in rows]
    weight, clipped = model.start.clone().requires_grad_(), 0.0
    for _ in range(steps):
        parts = []
        for part, reference in zip(rows, references, strict=True):
            policy, scores = model.micro_batch(weight, part)
            incentives = losses.incentives(objective, policy, reference)
            policy, _, sums = calibration.calibrate(policy, incentives, scores)
            (objective(policy, reference).loss.sum() / model.pairs).backward()
            parts.append(sums)
        total = torch.stack(parts).sum(0)
        clipped += calibration.metrics(total)["calibration/clipped"].item()
        calibration.update(total)
        with torch.no_grad():
            weight -= 0.05 * weight.grad
        weight.grad = None
    return weight.detach(), calibration, clipped


@pytest.mark.parametrize("name", ["dpo", "simpo", "dil_bce"])
def test_accumulation_does_not_change_the_result(name):
    """Eight micro-batches are one, after six steps, but for the order of fp64 sums."""
    model = Head(pairs=16)
    whole, one, clipped = train(model, name, micro_batches=1)
    parts, eight, clipped_in_parts = train(model, name, micro_batches=8)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(eight.averages, one.averages, rtol=1e-11, atol=1e-11)
    assert clipped == clipped_in_parts and (clipped > 0 or name != "simpo")
    assert (whole - model.start).abs().max() > 1e-3  # it did train


def test_the_first_step_is_not_calibrated_and_the_second_is():
    model = Head(pairs=4)
    rows, objective = slice(0, 4), losses.build("dpo")
    calibration = PairCalibration()
    for step in range(2):
        policy, scores = model.micro_batch(model.start.requires_grad_(), rows)
        incentives = losses.incentives(objective, policy, policy.detach())
        _, factor, sums = calibration.calibrate(policy, incentives, scores)
        gap = scores.rejected_norm.log().mean() - scores.chosen_norm.log().mean()
        expected = 1.0 if step == 0 else math.exp(gap.item() / 2)
        assert factor.tolist() == pytest.approx([expected] * 4, rel=1e-10)
        calibration.update(sums)


def test_the_state_continues_to_the_same_bit():
    objective = losses.build("cpo")
    policy, reference = batch(pairs=5)
    incentives = losses.incentives(objective, policy, reference)
    first = settled(incentives, geometry(5))
    state = first.state_dict()
    second = PairCalibration()
    second.load_state_dict(state)
    for calibration in (first, second):
        sums = calibration.calibrate(policy, incentives, geometry(5, seed=1)).sums
        calibration.update(sums)
    assert torch.equal(first.averages, second.averages)
    assert not torch.equal(state["averages"], first.averages)  # not changed by `update`
    fresh = PairCalibration().state_dict()
    second.load_state_dict(fresh)
    assert second.averages.isnan().all()


@pytest.mark.parametrize("state", [{}, {"averages": torch.zeros(3)}, {"averages": torch.zeros(4)}])
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match=r"state: expected float64 averages of shape \(4,\)"):
        PairCalibration().load_state_dict(state)


def test_nothing_is_read_from_the_device():
    """A tensor on the meta device has no values: reading one raises."""
    policy = SequenceLogps.from_sequences(
        torch.empty(6, device="meta", requires_grad=True), torch.empty(6, device="meta")
    )
    columns = [torch.empty(3, device="meta") for _ in range(5)]
    calibration = PairCalibration(device="meta")
    out = calibration.calibrate(policy, (columns[0], columns[1]), ScoreGeometry(*columns[2:]))
    calibration.update(out.sums)
    assert calibration.metrics(out.sums)["calibration/factor"].shape == ()
    (out.policy.chosen.sum() + out.policy.rejected.sum()).backward()


def test_for_one_pair_a_step_both_readings_agree():
    """Factors and averages of ten steps; every second pair is clipped to its band."""
    by_pair, by_batch = PairCalibration(momentum=0.8), RewardCalibration(momentum=0.8)
    policy, _ = batch(pairs=1)
    clipped = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        d_w, d_l = torch.exp(2 * torch.randn(2, 1, generator=g, dtype=torch.float64))
        scores = geometry(1, cosine=0.9 if seed % 2 else -0.1, seed=seed)
        statistics = BatchStatistics(d_w[0], d_l[0], ScoreGeometry(*(x[0] for x in scores)))
        out = by_pair.calibrate(policy, (d_w, d_l), scores)
        factor, counts = by_batch.factor(statistics)
        torch.testing.assert_close(factor, out.factor[0], rtol=1e-15, atol=0)
        clipped += counts[1].item()
        by_pair.update(out.sums)
        by_batch.update(statistics)
        torch.testing.assert_close(by_batch.averages, by_pair.averages, rtol=1e-15, atol=1e-15)
    assert clipped >= 3
