"""Numbers that go wrong in training: losses that are not finite, by row, the steps that are left
out for it, and losses that jump."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpref import distributed

MOST_SKIPPED = 10  # steps in a row; a model that has gone bad does not come back
SPIKE = 6.0  # standard deviations above the usual loss
_MEMORY = 0.98  # of the usual loss, each step
_AT_LEAST = 20  # steps before anything counts as unusual


class NonFiniteTracker:
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
        found = distributed.gather(torch.tensor(own, dtype=torch.int64, device=device))
        return sorted(found.tolist())

    def forget(self) -> None:
        self._seen.clear()


class SkippedSteps:
    """Steps that were left out because a number of theirs was not finite."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._in_a_row = self.count = 0

    def see(self, step: int, rows: list[int]) -> bool:
        """Take in such a step and its rows; whether there have been too many in a row."""
        self._rows[str(step)] = rows
        self._in_a_row += 1
        self.count += 1
        return self._in_a_row >= MOST_SKIPPED

    def end_row(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def flush(self) -> dict[str, dict[str, list[int]]]:
        """Rows by step since the last call, where there were any, as a line of metrics has them."""
        rows, self._rows = self._rows, {}
        return {"steps/skipped": rows} if rows else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, for JSON."""
        return {"rows": self._rows, "in_a_row": self._in_a_row, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self._rows, self._in_a_row = dict(state["rows"]), state["in_a_row"]
        self.count = state["count"]


class SpikeDetector:
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
