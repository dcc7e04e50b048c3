"""Policies that are tables of logits: experiments on small sets of responses, without a network.

Many tables are trained at once, (W, K), each on pairs of its own; nothing is shared between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import losses
from fastpref.logps import SequenceLogps


class Pairs(NamedTuple):
    """Pairs of responses of a step, B of each table."""

    chosen: Tensor  # (W, B) indices of responses
    rejected: Tensor
    weights: Tensor | None = None  # (W, B) that sum to 1 in a table; None: all the same
    preference: Tensor | None = None  # (W, B) soft labels


def train(
    start: Tensor,  # (W, K) log-probs, the reference too
    loss: dict[str, Any],
    pairs: Callable[[int], Pairs],
    steps: int,
    lr: float,
    max_norm: float = 1.0,
) -> Tensor:
    """Train a table of logits for each row by RMSprop and return its log-probs, (W, K).

    The learning rate falls linearly to zero. Gradients are clipped table by table.
    """
    objective = losses.build(**loss)
    assert isinstance(objective, losses.PairwiseLoss)
    table = start.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([table], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        batch = pairs(step)
        policy, reference = (_logps(logps, batch) for logps in (table.log_softmax(1), start))
        values = objective(policy, reference if objective.needs_reference else None).loss
        values = values.view(batch.chosen.shape)
        total = values.mean(1) if batch.weights is None else (values * batch.weights).sum(1)
        optimizer.zero_grad()
        total.sum().backward()
        assert table.grad is not None
        norms = table.grad.norm(dim=1, keepdim=True)
        table.grad.mul_((max_norm / norms.clamp(min=1e-12)).clamp(max=1.0))
        optimizer.step()
        schedule.step()
    return table.detach().log_softmax(1)


def _logps(logps: Tensor, pairs: Pairs) -> SequenceLogps:
    """The pairs of all tables in one batch, of responses of one token."""
    chosen, rejected = (logps.gather(1, side).flatten() for side in pairs[:2])
    ones = torch.ones(chosen.numel(), dtype=torch.long)
    preference = None if pairs.preference is None else pairs.preference.flatten()
    return SequenceLogps(chosen, rejected, ones, ones, preference)


def all_pairs(count: int, tables: int) -> tuple[Tensor, Tensor]:
    """Every ordered pair of `count` responses, for every table: two of (W, count²)."""
    responses = torch.arange(count)
    chosen, rejected = torch.cartesian_prod(responses, responses).unbind(1)
    return chosen.expand(tables, -1), rejected.expand(tables, -1)


def always(pairs: Pairs) -> Callable[[int], Pairs]:
    """The same pairs in every step."""
    return lambda step: pairs


def draw(logps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` responses from each table, (W, K) -> (W, count)."""
    return torch.multinomial(logps.exp(), count, replacement=True, generator=generator)


@torch.no_grad()
def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence of distributions given as log-probs, (…, K) -> (…), nats."""
    middle = torch.logaddexp(p, q) - math.log(2)
    sides = [(x.exp() * (x - middle)).sum(-1) for x in (p, q)]
    # Rounding leaves a divergence of zero at some 1e-17 on either side.
    return ((sides[0] + sides[1]) / 2).clamp(min=0)


def entropy(logps: Tensor) -> Tensor:
    """Entropy of distributions given as log-probs, (…, K) -> (…), nats."""
    return -(logps.exp() * logps).sum(-1)
