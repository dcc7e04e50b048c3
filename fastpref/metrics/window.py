"""Sums of the optimizer steps since the last line of metrics."""

from __future__ import annotations

import math
import resource
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.metrics.pairs import PAIR_METRICS, Metrics, means

TIMING_METRICS = ("tokens_per_second", "peak_memory_gib")  # all else repeats bit for bit on CPU


class NonFinite(NamedTuple):
    step: int
    metric: str
    value: float


class Window:
    """Sums of the optimizer steps since the last line of metrics, kept on the device.

    Each rank adds its own. Reading them, which all ranks do at the same steps, adds them up; it is
    the only host sync of the training loop.

    names: the metrics whose sums it keeps; the first is the loss.
    """

    def __init__(self, names: tuple[str, ...] = PAIR_METRICS) -> None:
        self._names = names
        self._steps: list[int] = []
        self._rows: list[Tensor] = []  # each (1 + 2 M,): gradient norm, sums, counts
        self._settled = 0  # so many of the rows are those of all ranks

    def add(self, step: int, grad_norm: Tensor, sums: Tensor) -> None:
        """Take in a step's gradient norm (), the same on all ranks, and sums and counts (2, M)."""
        self._steps.append(step)
        self._rows.append(torch.cat([grad_norm.to(sums).view(1), sums.flatten()]))

    def first_non_finite(self) -> NonFinite | None:
        """The first step with a sum of PAIR_METRICS, or a gradient norm, that is not finite."""
        if not self._rows:
            return None
        for step, row in zip(self._steps, self.state()[1].tolist(), strict=True):
            sums = zip(PAIR_METRICS, row[1:], strict=False)
            for metric, value in (*sums, ("grad_norm", row[0])):
                if not math.isfinite(value):
                    return NonFinite(step, metric, value)
        return None

    def drop_last(self) -> None:
        """Leave out the step that was taken in last, whose rows have been read."""
        steps, rows = self.state()
        self.restore(steps[:-1], rows[:-1])

    def flush(self) -> Metrics:
        """Means over the window and the mean gradient norm, none of no step; empties the window."""
        rows = self.state()[1]
        self.restore([], rows[:0])
        if not len(rows):
            return {}
        return {
            **means(rows[:, 1:].sum(0).view(2, -1), self._names),
            "grad_norm": rows[:, 0].mean().item(),
        }

    def state(self) -> tuple[list[int], Tensor]:
        """Steps and their rows of all ranks on the host, for a checkpoint."""
        if self._settled < len(self._rows):
            own = torch.stack(self._rows[self._settled :])
            totals = distributed.all_reduce_sum_(own.clone())
            totals[:, 0] = own[:, 0]
            self._rows[self._settled :] = totals.cpu()
            self._settled = len(self._rows)
        empty = torch.zeros(0, 1 + 2 * len(self._names), dtype=torch.float64)
        return self._steps, torch.stack(self._rows) if self._rows else empty

    def restore(self, steps: list[int], rows: Tensor) -> None:
        self._steps, self._rows, self._settled = list(steps), list(rows), len(rows)


def peak_memory(device: torch.device) -> float:
    """GiB at most so far, of the rank with most: allocated on its GPU, or resident in memory."""
    if device.type == "cuda":
        return distributed.all_reduce_max(torch.cuda.max_memory_allocated(device) / 2**30)
    return distributed.all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
