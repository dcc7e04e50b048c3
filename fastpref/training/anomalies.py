"""Losses that are not finite, by row; the steps skipped because of them; and loss spikes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.losses import Output
from fastpref.training.forward import MicroBatchLogps
from fastpref.training.step_hook import StepHook

MOST_SKIPPED = 10  # steps in a row; a model that has diverged does not recover
SPIKE = 6.0  # standard deviations above the usual loss
_DECAY = 0.98  # of the usual loss, each step
_MIN_STEPS = 20  # before any loss counts as a spike


class NonFiniteTracker(StepHook):
    """Groups with a loss that is not finite, by step, since the last `clear`.

    Nothing waits for the device until `groups` is called.
    """

    def __init__(self) -> None:
        self._step = 0
        self._micro_batches: dict[int, list[tuple[list[int], Tensor]]] = {}

    def before_step(self, step: int) -> None:
        self._step = step + 1

    def after_micro_batch(self, groups: list[int], logps: MicroBatchLogps, output: Output) -> None:
        self.record(groups, output.loss)

    def record(self, groups: list[int], losses: Tensor) -> None:
        """Record the losses of the groups of a micro-batch, (G,)."""
        not_finite = ~losses.detach().isfinite()
        self._micro_batches.setdefault(self._step, []).append((groups, not_finite))

    def groups(self, step: int, device: torch.device) -> list[int]:
        """Return the groups of step `step`, counted from 1, of all ranks; all ranks call this."""
        own = [
            group
            for groups, not_finite in self._micro_batches.get(step, ())
            for group, bad in zip(groups, not_finite.tolist(), strict=True)
            if bad
        ]
        gathered = distributed.gather(torch.tensor(own, dtype=torch.int64, device=device))
        return sorted(gathered.tolist())

    def clear(self) -> None:
        self._micro_batches.clear()


class SkippedSteps(StepHook):
    """Steps that were skipped because their loss or gradient was not finite."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._in_a_row = self.count = 0

    def record(self, step: int, rows: list[int]) -> bool:
        """Record a skipped step and its rows; return whether there are too many in a row."""
        self._rows[str(step)] = rows
        self._in_a_row += 1
        self.count += 1
        return self._in_a_row >= MOST_SKIPPED

    def after_step(self) -> None:
        self._in_a_row = 0

    def metrics(self) -> dict[str, dict[str, list[int]]]:
        rows, self._rows = self._rows, {}
        return {"steps/skipped": rows} if rows else {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "in_a_row": self._in_a_row, "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self._rows, self._in_a_row = dict(state["rows"]), state["in_a_row"]
        self.count = state["count"]


class SpikeDetector(StepHook):
    """Losses of steps, compared to their running mean and variance.

    A spike moves the averages by no more than the largest loss that is none: one spike does not
    hide the next, and a loss that stays high becomes the usual one.
    """

    def __init__(self) -> None:
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def is_spike(self, loss: float) -> bool:
        """Record the loss of the next step; return whether it is a spike."""
        limit = self._mean + SPIKE * math.sqrt(self._variance)
        spike = self._steps >= _MIN_STEPS and loss > limit
        loss = min(loss, limit) if spike else loss
        self._steps += 1
        weight = max(1 - _DECAY, 1 / self._steps)
        change = loss - self._mean
        self._mean += weight * change
        self._variance = (1 - weight) * (self._variance + weight * change**2)
        return spike

    @property
    def usual(self) -> float:
        """Running mean of the losses."""
        return self._mean

    def state_dict(self) -> list[float]:
        return [self._steps, self._mean, self._variance]

    def load_state_dict(self, state: Any) -> None:
        steps, self._mean, self._variance = state
        self._steps = int(steps)
