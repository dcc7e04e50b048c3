"""The length-controlled win rate against closed forms, another fit, and judges that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastpref.evaluation.judge.length_control import RIDGE, fit, length_controlled

LOGIT = {0.25: -1.0986122886681098, 0.5: 0.0, 0.8: 1.3862943611198906}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def controlled(preferences: Any, differences: Any, **options: Any) -> Any:
    prompts = np.arange(len(preferences))
    options = {"resamples": 20, **options}
    return length_controlled(
        np.asarray(preferences, float), np.asarray(differences, float), prompts, **options
    )


def test_two_groups_of_opposite_lengths_have_a_closed_form() -> None:
    """The fit meets both group means, 0.8 and 0.25, so θ is the mean of their logits."""
    result = controlled([0.8] * 5000 + [0.25] * 5000, [300] * 5000 + [-300] * 5000)
    theta = (LOGIT[0.8] + LOGIT[0.25]) / 2
    assert result.bias == pytest.approx(theta, abs=1e-5)
    # d/s is ±1 but for the sample's correction of the deviation.
    assert result.length == pytest.approx((LOGIT[0.8] - LOGIT[0.25]) / 2 / np.tanh(1.0), abs=1e-3)
    assert result.win_rate == pytest.approx(sigmoid(theta), abs=1e-5)
    assert result.scale == pytest.approx(300.0, rel=1e-3)


def test_the_fit_is_the_optimum_of_another_optimizer() -> None:
    """Soft labels, weights and three features, by L-BFGS on autograd."""
    random = np.random.default_rng(1)
    features = np.concatenate([np.ones((150, 1)), random.normal(size=(150, 2))], axis=1)
    preferences, weights = random.uniform(size=150), random.integers(0, 4, 150).astype(float)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)
    x, q, weight = (torch.from_numpy(array) for array in (features, preferences, weights))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ w, q, weight, reduction="sum"
        )
        loss = loss + RIDGE / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    other = random.integers(0, 4, 150).astype(float)
    ours = fit(features, preferences, np.stack([other, weights]))
    np.testing.assert_allclose(ours[1], w.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(ours[0], fit(features, preferences, other[None])[0], atol=1e-7)


def test_the_fit_is_that_of_scikit_learn() -> None:
    """LogisticRegression(C=1000, fit_intercept=False) of version 1.9.1, each pair as two rows."""
    preferences = [1, 0.5, 0, 1, 1, 0.5, 0, 1, 0, 1, 0.5, 1]
    result = controlled(preferences, [120, -40, -310, 260, 15, 0, 90, 400, -150, -60, 30, 220])
    assert result.bias == pytest.approx(0.33102893, abs=1e-7)
    assert result.length == pytest.approx(2.44272697, abs=1e-7)
    assert result.win_rate == pytest.approx(0.58200971, abs=1e-8)


@pytest.mark.parametrize("steepness", [3.0, 8.0, np.inf])
def test_a_judge_that_only_likes_length_gives_half(steepness: float) -> None:
    """Lengths are skewed: the model's answer is longer in about three of four pairs."""
    rates = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        differences = np.round(random.normal(200, 300, 800))
        if steepness == np.inf:
            preferences = (np.sign(differences) + 1) / 2
        else:
            probabilities = sigmoid(steepness * np.tanh(differences / differences.std()))
            preferences = random.uniform(size=800) < probabilities
        assert preferences.mean() > 0.65
        result = controlled(preferences, differences, resamples=100)
        assert abs(result.win_rate - 0.5) < 3 * result.standard_error
        rates.append(result.win_rate)
    assert np.mean(rates) == pytest.approx(0.5, abs=3 * np.std(rates) / 20**0.5)
    assert np.std(rates) < 0.1


def test_a_judge_that_likes_length_and_quality_gives_the_quality() -> None:
    """Verdicts are drawn from the model of the regression, with θ = 0.6 and φ = 1.5."""
    random = np.random.default_rng(3)
    differences = random.normal(250, 400, 8000)
    probabilities = sigmoid(0.6 + 1.5 * np.tanh(differences / differences.std(ddof=1)))
    preferences = random.uniform(size=8000) < probabilities
    result = controlled(preferences, differences, resamples=200)
    truth = sigmoid(0.6)
    assert preferences.mean() - truth > 0.08
    assert abs(result.win_rate - truth) < 3 * result.standard_error
    assert 0.004 < result.standard_error < 0.012


def test_a_judge_that_does_not_see_length_keeps_its_win_rate() -> None:
    random = np.random.default_rng(4)
    preferences = random.choice([0.0, 0.5, 1.0], 4000, p=[0.2, 0.2, 0.6])
    result = controlled(preferences, random.normal(250, 400, 4000), resamples=200)
    assert abs(result.win_rate - preferences.mean()) < 3 * result.standard_error


def test_swapping_the_models_swaps_the_rate() -> None:
    random = np.random.default_rng(5)
    preferences, differences = random.uniform(size=300), random.normal(100, 300, 300)
    forward = controlled(preferences, differences)
    backward = controlled(1 - preferences, -differences)
    assert forward.win_rate == pytest.approx(1 - backward.win_rate, abs=1e-9)
    assert forward.standard_error == pytest.approx(backward.standard_error, abs=1e-9)


def test_the_known_difficulty_explains_its_part() -> None:
    """Hard prompts lower the preference; they are also those with longer answers."""
    random = np.random.default_rng(6)
    difficulty = random.normal(0, 1, 8000)
    differences = 300 * difficulty + random.normal(0, 300, 8000)
    length = np.tanh(differences / differences.std(ddof=1))
    probabilities = sigmoid(0.4 + 1.0 * length - 1.2 * difficulty)
    preferences = random.uniform(size=8000) < probabilities
    result = controlled(preferences, differences, difficulties=difficulty, resamples=100)
    truth = sigmoid(0.4 - 1.2 * difficulty).mean()
    assert abs(result.win_rate - truth) < 3 * result.standard_error
    assert result.difficulty == pytest.approx(-1.2, abs=0.1)
    assert controlled(preferences, differences).difficulty is None


@pytest.mark.parametrize(("opinion", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_a_judge_of_one_opinion_is_finite(opinion: float, expected: float) -> None:
    result = controlled([opinion] * 50, np.arange(-10, 40))
    assert result.win_rate == pytest.approx(expected, abs=5e-4)
    assert np.isfinite([result.bias, result.length, result.standard_error]).all()


def test_equal_lengths_leave_the_win_rate() -> None:
    result = controlled([1.0, 1.0, 0.0, 0.5], [7, 7, 7, 7])
    assert result.scale == 0
    assert result.win_rate == pytest.approx(0.625, abs=1e-3)
    single = controlled([1.0], [3])
    assert single.standard_error is None and single.win_rate > 0.99


def test_the_bootstrap_draws_prompts_and_not_pairs() -> None:
    """Four copies of every pair bring no information if they share their prompts."""
    random = np.random.default_rng(7)
    preferences, differences = random.uniform(size=200), random.normal(0, 300, 200)
    once = length_controlled(preferences, differences, np.arange(200), resamples=300)
    copies = length_controlled(
        np.tile(preferences, 4), np.tile(differences, 4), np.tile(np.arange(200), 4), resamples=300
    )
    assert copies.standard_error == pytest.approx(once.standard_error, rel=0.02)
