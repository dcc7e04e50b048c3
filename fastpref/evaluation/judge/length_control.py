r"""Win rate at equal lengths, by a logistic regression on the difference of lengths.

The preference of pair i for the model's answer, q_i in [0, 1], is regressed on

    P_i = σ(θ + φ · tanh(d_i / s) + ψ · γ_i)

d_i: characters of the model's answer less those of the baseline's; s: standard deviation of d;
γ_i: difficulty of the instruction, where it is known, else the term is left out. θ, φ and ψ
maximize Σ w_i [q_i log P_i + (1 − q_i) log(1 − P_i)] − λ/2 (θ² + φ² + ψ²), λ = 10⁻³. The penalty
makes the maximum finite if a judge is always of one opinion; otherwise it changes no printed digit.
The length-controlled win rate is the mean of σ(θ + ψ · γ_i), which is P_i at d_i = 0.

The model is that of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475, Eq. 2). Its program also
adds pairs of two manipulated baselines with weight 0.1, takes an L1 penalty chosen by
cross-validation, and has γ for its own 805 instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-3
RESAMPLES = 1000
_STEPS = 100
_HALVINGS = 40
_TOLERANCE = 1e-10  # on the gradient, relative to the number of pairs
_BLOCK = 1 << 18  # weights of resamples at a time
Array = NDArray[np.float64]


class LengthControl(NamedTuple):
    """Coefficients of the regression, and the win rate that they predict at equal lengths."""

    win_rate: float  # share
    standard_error: float | None  # bootstrap over prompts; None for a single prompt
    bias: float  # θ
    length: float  # φ
    difficulty: float | None  # ψ
    scale: float  # s, characters


def length_controlled(
    preferences: Array,
    length_differences: Array,
    prompts: NDArray[np.int64],
    difficulties: Array | None = None,
    resamples: int = RESAMPLES,
) -> LengthControl:
    """Fit the regression and predict the win rate at equal lengths.

    preferences: (N,), in [0, 1]. length_differences: (N,), characters. prompts: (N,), number of
    each pair's prompt from 0; the bootstrap draws prompts. difficulties: (N,).
    """
    count = len(preferences)
    scale = float(length_differences.std(ddof=1)) if count > 1 else 0.0
    # Without differences there is nothing to control for.
    length = np.tanh(length_differences / scale) if scale > 0 else np.zeros(count)
    features = np.stack([np.ones(count), length], axis=1)
    if difficulties is not None:
        features = np.concatenate([features, difficulties[:, None]], axis=1)
    at_equal_length = features.copy()
    at_equal_length[:, 1] = 0.0
    coefficients = fit(features, preferences, np.ones((1, count)))[0]
    win_rate = float(_sigmoid(at_equal_length @ coefficients).mean())
    distinct, numbers = np.unique(prompts, return_inverse=True)
    rates = []
    for weights in _resamples(numbers, len(distinct), resamples):
        predictions = _sigmoid(
            fit(features, preferences, weights, coefficients) @ at_equal_length.T
        )
        rates.append((weights * predictions).sum(1) / weights.sum(1))
    return LengthControl(
        win_rate,
        float(np.concatenate(rates).std(ddof=1)) if len(distinct) > 1 else None,
        bias=float(coefficients[0]),
        length=float(coefficients[1]),
        difficulty=None if difficulties is None else float(coefficients[2]),
        scale=scale,
    )


def fit(features: Array, preferences: Array, weights: Array, start: Array | None = None) -> Array:
    """Coefficients (R, K) of R penalized logistic regressions, by Newton's method.

    features: (N, K). preferences: (N,), in [0, 1]. weights: (R, N), those of each regression.
    start: (K,), default zeros.
    """
    count, size = features.shape
    coefficients = np.zeros((len(weights), size)) + (0.0 if start is None else start)
    squares = (features[:, :, None] * features[:, None, :]).reshape(count, size * size)
    objective = _objective(features, preferences, weights, coefficients)
    for _ in range(_STEPS):
        predictions = _sigmoid(coefficients @ features.T)
        gradient = (weights * (predictions - preferences)) @ features + RIDGE * coefficients
        if np.abs(gradient).max() <= _TOLERANCE * count:
            break
        curvature = weights * predictions * (1 - predictions)
        hessian = (curvature @ squares).reshape(-1, size, size) + RIDGE * np.eye(size)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        # Near separation a full step overshoots.
        for _ in range(_HALVINGS):
            value = _objective(features, preferences, weights, coefficients - step)
            overshoots = value > objective + _TOLERANCE
            if not overshoots.any():
                break
            step[overshoots] /= 2
        coefficients = coefficients - step
        objective = value
    return coefficients


def _resamples(numbers: NDArray[np.int64], prompts: int, count: int) -> Iterator[Array]:
    """Weights of the pairs in `count` draws of prompts, in blocks (R, N) of limited memory."""
    generator = np.random.default_rng(0)
    size = max(1, _BLOCK // len(numbers))
    for begin in range(0, count, size):
        draws = [
            np.bincount(generator.integers(prompts, size=prompts), minlength=prompts)[numbers]
            for _ in range(min(size, count - begin))
        ]
        yield np.stack(draws).astype(np.float64)


def _objective(features: Array, preferences: Array, weights: Array, coefficients: Array) -> Array:
    """Penalized cross-entropy of each regression, (R,)."""
    logits = coefficients @ features.T
    # log(1 + e^x) − q·x is the cross-entropy of a soft label.
    losses = np.logaddexp(0.0, logits) - preferences * logits
    return (weights * losses).sum(1) + RIDGE / 2 * (coefficients**2).sum(1)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))
