"""Monitors at points with known answers, for each kind of objective."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref import metrics
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import Logps
from fastpref.metrics import preference as monitors


def logps(margins: list[float], p: list[float]) -> SequenceLogps:
    margin = vector(*margins)
    ones = torch.ones_like(margin)
    return SequenceLogps(margin - 1, -ones, ones, ones, vector(*p))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def watch(
    policy: Logps,
    reference: Logps | None = None,
    log_ratios: bool = False,
    margins: tuple[float, float] = (0.6, 0.8),
) -> dict[str, float]:
    contrast = monitors.contrastive_logits(policy, reference, log_ratios)
    sums = monitors.monitor_sums(policy, reference, contrast, margins)
    assert sums.shape == (2, len(monitors.MONITORS)) and sums.dtype == torch.float64
    return metrics.means(sums, monitors.MONITORS)


def preference(margins: list[float], p: list[float]) -> dict[str, float]:
    return watch(logps(margins, p))


def test_a_policy_that_matches_the_target() -> None:
    p = [0.9, 0.6, 0.25]
    values = preference([math.log(x / (1 - x)) for x in p], p)
    assert values["preference/mean_kl"] == pytest.approx(0, abs=1e-12)
    assert values["preference/accuracy"] == 1
    assert values["preference/pci"] == pytest.approx((0.1 + 0.4 + 0.25) / 3)


def test_an_undecided_and_a_collapsed_policy() -> None:
    undecided = preference([0.0, 0.0], [0.9, 0.2])
    assert undecided["preference/pci"] == 0.5
    assert undecided["preference/accuracy"] == 0.5  # 1/2 is on the side of the smaller p
    collapsed = preference([50.0], [0.9])
    assert collapsed["preference/pci"] == pytest.approx(0, abs=1e-20)
    # KL(B(p) || B(1)) grows with the margin: p log p + (1 - p) (log(1 - p) + 50)
    expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 50)
    assert collapsed["preference/mean_kl"] == pytest.approx(expected, abs=1e-9)


def test_certain_targets_have_finite_kl() -> None:
    values = preference([2.0, 2.0], [1.0, 0.0])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert values["preference/mean_kl"] == pytest.approx(expected)


def pairs() -> tuple[SequenceLogps, SequenceLogps]:
    """Contrast per token: -1/2 + 1 = .5, -1 + 2 = 1, and 0 + .7 of an empty chosen response."""
    lengths = torch.tensor([2, 1, 0]), torch.tensor([4, 2, 1])
    policy = SequenceLogps(vector(-1, -1, 0), vector(-4, -4, -0.7), *lengths)
    reference = SequenceLogps(vector(-2, -1.5, 0), vector(-3, -4, -1), *lengths)
    return policy, reference


def test_pairs_without_a_reference() -> None:
    policy, _ = pairs()
    assert watch(policy) == {
        "lengths/chosen": 1.0,
        "lengths/rejected": 7 / 3,
        "lengths/empty": 1 / 6,
        "contrast/mean": pytest.approx((0.5 + 1 + 0.7) / 3),
        "contrast/below": 1 / 3,
        "contrast/inside": 1 / 3,
        "contrast/above": 1 / 3,
    }


def test_pairs_with_a_reference() -> None:
    values = watch(*pairs(), log_ratios=True, margins=(0.0, 1.0))
    assert values["logps/chosen_change"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert values["logps/rejected_change"] == pytest.approx((-1 + 0 + 0.3) / 3)
    assert values["contrast/mean"] == pytest.approx((2 + 0.5 - 0.3) / 3)
    shares = [values[f"contrast/{name}"] for name in ("below", "inside", "above")]
    assert shares == [1 / 3, 1 / 3, 1 / 3]


def test_tokens_of_pairs_count_as_their_sums() -> None:
    offsets = torch.tensor([0, 2, 3, 3, 4])
    tokens = TokenLogps(vector(-1, -2, -3, -4), offsets, vector(0.8, 0.4), weights=vector(*4 * [2]))
    lengths = torch.tensor([2, 1]), torch.tensor([0, 1])
    sums = SequenceLogps(vector(-3, -3), vector(0, -4), *lengths, vector(0.8, 0.4))
    assert watch(tokens) == watch(sums)


def test_single_responses_are_those_of_their_class() -> None:
    labels = torch.tensor([True, False, True])
    policy = UnpairedLogps(vector(-1, -2, -4), torch.tensor([1, 0, 3]), labels)
    reference = UnpairedLogps(vector(-2, -5, -3), torch.tensor([1, 0, 3]), labels)
    assert watch(policy, reference) == {
        "logps/chosen_change": 0.0,
        "logps/rejected_change": 3.0,
        "lengths/chosen": 2.0,
        "lengths/rejected": 0.0,
        "lengths/empty": 1 / 3,
    }


def test_groups_are_watched_by_their_best_and_worst() -> None:
    """Three unequal; two equal, which have neither; two groups share no response."""
    policy = GroupedLogps(
        vector(-1, -2, -3, -4, -5, -6, -7),
        torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        torch.tensor([0, 3, 5, 7]),
        vector(0.5, 0.9, 0.1, 3, 3, 1, 2),
    )
    values = watch(policy)
    assert values["lengths/chosen"] == (2 + 7) / 2
    assert values["lengths/rejected"] == (3 + 6) / 2


def test_the_histogram_counts_every_finite_value() -> None:
    histogram = monitors.histogram(vector(-1, 0, 0, 3, math.inf, math.nan), bins=4)
    assert histogram == {"counts": [1, 2, 0, 1], "edges": [-1, 0, 1, 2, 3]}


def test_the_histogram_of_equal_values() -> None:
    assert sum(monitors.histogram(torch.zeros(7))["counts"]) == 7


def test_calibration_sums_by_the_bin_of_the_prediction() -> None:
    """ph .05, .5, 1 - 1e-22 (rounds to 1) and .55: bins 0, 5, 9 and 5."""
    p = [0.1, 0.2, 1.0, 0.4]
    calibration = monitors.calibration(
        monitors.calibration_sums(logps([math.log(1 / 19), 0, 50, math.log(0.55 / 0.45)], p))
    )
    count, predicted, target = ([0.0] * 10 for _ in range(3))
    count[0], predicted[0], target[0] = 1, pytest.approx(0.05), 0.1
    count[5], predicted[5], target[5] = 2, pytest.approx(1.05), pytest.approx(0.6)
    count[9], predicted[9], target[9] = 1, 1.0, 1.0
    assert calibration == {"count": count, "predicted": predicted, "target": target}


def test_calibration_counts_no_pair_without_a_soft_label() -> None:
    policy, _ = pairs()
    assert monitors.calibration_sums(policy).count_nonzero() == 0
