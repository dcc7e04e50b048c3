"""Numbers that go wrong in training: losses that are not finite, by row, and losses that jump."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref import ranks

SPIKE = 6.0  # standard deviations above the usual loss
_MEMORY = 0.98  # of the usual loss, each step
_AT_LEAST = 20  # steps before anything counts as unusual


class Losses:
    """Which groups of the steps since the last look had a loss that is not finite.

    Nothing waits for the device until somebody asks.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[list[int], Tensor]]] = {}

    def see(self, step: int, groups: list[int], loss: Tensor) -> None:
        """Take in a micro-batch of a step: loss (B,) of its groups, by their index."""
        self._seen.setdefault(step, []).append((groups, ~loss.detach().isfinite()))

    def not_finite(self, step: int, device: torch.device) -> list[int]:
        """Groups of all ranks; each rank has to ask."""
        seen = self._seen.get(step, ())
        own = [
            g for groups, bad in seen for g, gone in zip(groups, bad.tolist(), strict=True) if gone
        ]
        found = ranks.gather(torch.tensor(own, dtype=torch.int64, device=device))
        return sorted(found.tolist())

    def forget(self) -> None:
        self._seen.clear()


class Spikes:
    """Losses of steps, beside their running mean and variance.

    A spike moves the averages by no more than the largest loss that is none: one does not hide the
    next, and a loss that stays high becomes the usual one.
    """

    def __init__(self) -> None:
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def see(self, loss: float) -> bool:
        """Whether the loss of this step is a spike."""
        limit = self._mean + SPIKE * math.sqrt(self._variance)
        spike = self._steps >= _AT_LEAST and loss > limit
        loss = min(loss, limit) if spike else loss
        self._steps += 1
        share = max(1 - _MEMORY, 1 / self._steps)
        change = loss - self._mean
        self._mean += share * change
        self._variance = (1 - share) * (self._variance + share * change**2)
        return spike

    @property
    def usual(self) -> float:
        return self._mean

    def state(self) -> list[float]:
        """What a checkpoint must hold, as numbers that JSON gives back exactly."""
        return [self._steps, self._mean, self._variance]

    def restore(self, state: list[float]) -> None:
        self._steps, self._mean, self._variance = int(state[0]), *state[1:]
