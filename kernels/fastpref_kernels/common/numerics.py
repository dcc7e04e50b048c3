"""Elementwise functions that keep their digits and stay finite, in fp32 and fp64.

No exponential is taken of a positive number beyond a stated limit, and no logarithm of a number
that was rounded to 1 before. NaN results in NaN. A function that is continued beyond a limit by its
tangent returns its value and its slope, which are continuous there.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

EXP_LIMIT = tl.constexpr(20.0)  # as in the plain-PyTorch objectives


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: the error of rounding 1 + x cancels in the quotient."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x < 0, by the same cancellation where e^x is close to 1."""
    y = tl.exp(tl.where(x > -0.5, x, -0.5))
    close = tl.where(y == 1.0, -x, (1.0 - y) * (x / tl.where(y == 1.0, 1.0, tl.log(y))))
    return tl.where(x > -0.5, close, 1.0 - tl.exp(x))


@triton.jit
def sigmoid(x):
    """S(x) = 1 / (1 + e^-x), with its relative precision on both sides."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    """LS(x) = log S(x)."""
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid_slope(x):
    """S'(x) = S(x) S(-x)."""
    return sigmoid(x) * sigmoid(-x)


@triton.jit
def relu(x):
    """max(0, x)."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def indicator(condition, like):
    """1 where the condition holds, else 0, in the dtype of `like`."""
    return tl.where(condition, 1.0, 0.0).to(like.dtype)


@triton.jit
def ones_like(x):
    """1 in the shape and dtype of x."""
    return tl.zeros_like(x) + 1.0


@triton.jit
def exp_linear(x):
    """e^x, continued beyond x = EXP_LIMIT, and its slope."""
    slope = tl.exp(tl.where(x > EXP_LIMIT, EXP_LIMIT, x))
    return slope * (1.0 + tl.where(x > EXP_LIMIT, x - EXP_LIMIT, 0.0)), slope


@triton.jit
def log1mexp(x, limit):
    """log(1 - e^x), continued beyond x = limit < 0, and its slope."""
    within = tl.where(x > limit, tl.full(x.shape, limit, x.dtype), x)  # a bare limit may be fp32
    rest = one_minus_exp(within)
    slope = -tl.exp(within) / rest
    return tl.log(rest) + slope * tl.where(x > limit, x - limit, 0.0), slope


@triton.jit
def per_token(x, n):
    """x / n, and 0 for an empty response."""
    return tl.where(n > 0, x / tl.where(n > 0, n, 1.0), 0.0)
