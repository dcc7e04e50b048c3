"""Guarded exponentials: exact below the limit, continuous at it, straight beyond it."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref.losses.numerics import EXP_LIMIT, exp_linear, log1mexp

FUNCTIONS = {
    "exp_linear": (exp_linear, math.exp, math.exp, EXP_LIMIT),
    "exp_linear, limit 2": (lambda x: exp_linear(x, 2.0), math.exp, math.exp, 2.0),
    "log1mexp": (
        lambda x: log1mexp(x, -1e-6),
        lambda x: math.log(-math.expm1(x)),
        lambda x: math.exp(x) / math.expm1(x),
        -1e-6,
    ),
}
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
every_function = pytest.mark.parametrize(
    ("function", "f", "slope", "limit"), FUNCTIONS.values(), ids=FUNCTIONS
)


def value_and_slope(function, points, dtype=torch.float64):
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@every_function
@both
def test_it_is_exact_below_its_limit(function, f, slope, limit, dtype):
    points = [-1e4, -50.0, -3.0, -math.log(2), -1e-3, -1e-5]
    value, gradient = value_and_slope(function, points, dtype)
    # fp32 holds the points themselves to 6e-8, which the slope of log(1 - e^x) leaves as it is.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    expected = torch.tensor([[g(x) for x in points] for g in (f, slope)], dtype=dtype)
    torch.testing.assert_close(value, expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected[1], rtol=tolerance, atol=tolerance)


@every_function
def test_value_and_slope_are_continuous_at_the_limit(function, f, slope, limit):
    step = 1e-9 * abs(limit)
    value, gradient = value_and_slope(function, [limit - step, limit, limit + step])
    torch.testing.assert_close(value, torch.full_like(value, f(limit)), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient, torch.full_like(value, slope(limit)), rtol=1e-7, atol=0)


@every_function
@both
def test_it_is_straight_beyond_its_limit(function, f, slope, limit, dtype):
    points = [limit + 1.0, limit + 10.0, 1e4]
    value, gradient = value_and_slope(function, points, dtype)
    expected = torch.tensor([f(limit) + slope(limit) * (x - limit) for x in points], dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    straight = torch.full_like(gradient, slope(limit))
    torch.testing.assert_close(gradient, straight, rtol=tolerance, atol=0)
