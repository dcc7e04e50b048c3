"""Pairs of log-probs, and what every pairwise objective must pass, for the tests of losses.

A closed form is a function (objective, zw, zl, rw, rl, nw, nl) -> (loss, d_w, d_l) of one pair with
a hard label, written in plain floats from the derivatives; the code under test has autograd.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

from fastpref import losses
from fastpref.logps import SequenceLogps


def sigmoid(x):
    return 0.5 * (1 + math.tanh(x / 2))


def bell(x):
    """The derivative of sigmoid."""
    return sigmoid(x) * sigmoid(-x)


def nls(x):
    """-log sigmoid(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def logit(p):
    return math.log(p / (1 - p))


def per(x, n):
    """A mean over n tokens, 0 over none."""
    return x / n if n else 0.0


def tangent(f, slope, x, limit):
    """f(x) and its derivative, beyond the limit those of the tangent."""
    inside = min(x, limit)
    return f(inside) + slope(inside) * max(x - limit, 0.0), slope(inside)


def exponential(x):
    """e^x, whose tangent takes over at e^20, and its derivative."""
    return tangent(math.exp, math.exp, x, 20.0)


def batch(pairs=32, seed=0, soft=False, spread=5.0):
    """Random policy and reference in fp64: z of -80 to -60 nats, log-ratios of a few nats.

    `soft` is whether there are soft labels, or one such label for every pair.
    """
    g = torch.Generator().manual_seed(seed)
    z = -60 - 20 * torch.rand(2 * pairs, generator=g, dtype=torch.float64)
    r = z + spread * torch.randn(2 * pairs, generator=g, dtype=torch.float64)
    n = torch.randint(1, 40, (2 * pairs,), generator=g)
    p = torch.rand(pairs, generator=g, dtype=torch.float64) if soft is True else None
    policy = SequenceLogps.from_sequences(z, n, p)
    policy = policy if isinstance(soft, bool) else with_label(policy, soft)
    return policy, SequenceLogps.from_sequences(r, n)


def pairs_of(zw, zl, nw=1, nl=1, p=None, dtype=torch.float64):
    """One pair from numbers."""
    value = [torch.tensor([float(x)], dtype=dtype) for x in (zw, zl)]
    length = [torch.tensor([n]) for n in (nw, nl)]
    return SequenceLogps(*value, *length, None if p is None else torch.tensor([p], dtype=dtype))


def with_label(policy, p):
    """The same pairs with one soft label for all."""
    return dataclasses.replace(policy, preference=torch.full_like(policy.chosen, p))


def means(policy):
    """Log-probs per token of both responses."""
    return policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths


def averaged(policy):
    """The same pairs with log-probs per token in place of their sums."""
    chosen, rejected = means(policy)
    return dataclasses.replace(policy, chosen=chosen, rejected=rejected)


def rows(policy, reference):
    """(zw, zl, rw, rl, nw, nl) of each pair."""
    columns = (policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    lengths = (policy.chosen_lengths, policy.rejected_lengths)
    return zip(*(column.tolist() for column in (*columns, *lengths)), strict=True)


def outputs(objective, policy, reference=None):
    """Loss, d_w and d_l, (B, 3)."""
    d_w, d_l = losses.incentives(objective, policy, reference)
    return torch.stack([objective(policy, reference).loss, d_w, d_l], dim=1)


def incentives_at(objective, tw, tl, p=None):
    """d_w and d_l of one pair of one-token responses at given log-ratios, as numbers."""
    d_w, d_l = losses.incentives(objective, pairs_of(tw, tl, p=p), pairs_of(0, 0))
    return d_w.item(), d_l.item()


def expected_outputs(closed_form, objective, policy, reference):
    """What `outputs` should be by the closed form, soft labels included."""
    table = []
    labels = [1.0] * policy.chosen.numel()
    if policy.preference is not None:
        labels = policy.preference.tolist()
    for p, (zw, zl, rw, rl, nw, nl) in zip(labels, rows(policy, reference), strict=True):
        loss, d_w, d_l = closed_form(objective, zw, zl, rw, rl, nw, nl)
        reversed_loss, reversed_w, reversed_l = closed_form(objective, zl, zw, rl, rw, nl, nw)
        q = 1 - p
        table.append(
            (p * loss + q * reversed_loss, p * d_w - q * reversed_l, p * d_l - q * reversed_w)
        )
    return table


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance
    )


def assert_matches(closed_form, objective, soft):
    """Loss and incentives are the closed form's, of which the one test is autograd's rounding."""
    for spread in (1.0, 5.0):  # 5 reaches far into the tails, and beyond most of the limits
        policy, reference = batch(soft=soft, spread=spread)
        expected = expected_outputs(closed_form, objective, policy, reference)
        # fp64 on values up to 1e4: 1e-10 leaves room for another order of the operations.
        assert_close(outputs(objective, policy, reference), expected, 1e-10)


def assert_matches_differences(objective, soft, spread=1.0):
    """Incentives are the slopes of the loss."""
    policy, reference = batch(soft=soft, spread=spread)
    # Truncation, h^2/6 times a third derivative of up to 100, is 2e-7.
    h = 1e-4

    def losses_at(side, step):
        moved = dataclasses.replace(policy, **{side: getattr(policy, side) + step})
        return objective(moved, reference).loss

    signs = {"chosen": -1, "rejected": 1}
    incentives = losses.incentives(objective, policy, reference)
    for (side, sign), d in zip(signs.items(), incentives, strict=True):
        up, down = losses_at(side, h), losses_at(side, -h)
        rounding = 1e-15 * up.abs() / h
        error = (sign * (up - down) / (2 * h) - d).abs()
        assert (error <= 1e-6 * (1 + d.abs()) + rounding).all()


# Log-ratios of one nat and less, at the ends of the clipped ranges, far beyond them, and extreme.
RATIOS = (0.0, 1e-7, 1e-3, 0.5, math.log(2), 4.6, 10.0, 20.5, 88.0, 1e3, 1e4)


def extremes(dtype, p=None):
    """Every two of some 150 responses as a pair: 1e5 nats, 1e4 nats of ratio, 32k or no tokens."""
    ratios = sorted({sign * t for t in RATIOS for sign in (1, -1)})
    responses = [(r + t, r, n) for t in ratios for r in (-90000, 0) for n in (0, 1, 32768)]
    responses += [(0, 0, 0), (-1e-7, -1e-3, 32768)]
    grid = torch.tensor([a + b for a, b in itertools.product(responses, repeat=2)], dtype=dtype)
    zw, rw, nw, zl, rl, nl = grid.unbind(1)
    policy = SequenceLogps(zw, zl, nw.long(), nl.long())
    return (policy if p is None else with_label(policy, p)), SequenceLogps(rw, rl, nw, nl)


def assert_finite(objective):
    """Loss, rewards and incentives of extreme pairs are finite and keep their precision."""
    for dtype, p in itertools.product((torch.float32, torch.float64), (None, 0.0, 0.3)):
        if p is None or objective.soft_labels:
            policy, reference = extremes(dtype, p)
            out = objective(policy, reference)
            incentives = losses.incentives(objective, policy, reference)
            for tensor in (out.loss, out.chosen_rewards, out.rejected_rewards, *incentives):
                assert tensor.dtype == dtype and tensor.isfinite().all()


def assert_matches_at_extremes(closed_form, objective, largest=0.0):
    """Large values come out right in both precisions.

    `largest` is the size of terms that cancel in the loss, if any: it sets the rounding there.
    """
    # 32768 tokens is a long context; an empty response has log-prob 0. Integers below 2^17 are
    # exact in fp32, so both precisions see the same inputs.
    responses = [(-65536 + ratio, -65536, n) for ratio in (-1e4, 0, 1e4) for n in (1, 32768)]
    responses.append((0, 0, 0))
    # fp32: eight units in the last place.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        grid = torch.tensor([a + b for a in responses for b in responses], dtype=dtype)
        zw, rw, nw, zl, rl, nl = grid.unbind(1)
        policy, reference = SequenceLogps(zw, zl, nw, nl), SequenceLogps(rw, rl, nw, nl)
        expected = expected_outputs(closed_form, objective, policy, reference)
        actual = outputs(objective, policy, reference)
        assert_close(actual[:, 1:], [row[1:] for row in expected], tolerance)
        loss = torch.tensor([row[0] for row in expected], dtype=torch.float64)
        bound = tolerance * (1 + loss.abs()) + torch.finfo(dtype).eps * largest
        assert ((actual[:, 0].double() - loss).abs() <= bound).all()


def assert_agrees(out, loss, chosen_rewards, rejected_rewards, tolerance=1e-12):
    """Another library's mean loss and rewards of each response."""
    assert_close(out.loss.mean(), loss, tolerance)
    assert_close(out.chosen_rewards, chosen_rewards, tolerance)
    assert_close(out.rejected_rewards, rejected_rewards, tolerance)
