"""Sums over the optimizer steps since the last metrics record."""

from __future__ import annotations

import math
import resource
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.metrics.pairs import PAIR_METRICS, Metrics, means

# All other metrics are bit-reproducible on CPU.
TIMING_METRICS = ("tokens_per_second", "eval_runtime", "peak_memory_gib")


class NonFinite(NamedTuple):
    """A metric that was not finite at a step."""

    step: int
    metric: str
    value: float


class Window:
    """Sums over the optimizer steps since the last metrics record, stored on the device.

    Each rank adds its local sums. All ranks read the window at the same steps; reading all-reduces
    the sums and is the only host sync of the training loop.

    names: the summed metrics; the first is the loss.
    """

    def __init__(self, names: tuple[str, ...] = PAIR_METRICS) -> None:
        self._names = names
        self._steps: list[int] = []
        self._rows: list[Tensor] = []  # each (1 + 2 M,): gradient norm, sums, counts
        self._reduced = 0  # rows before this index are already all-reduced

    def add(self, step: int, grad_norm: Tensor, sums: Tensor) -> None:
        """Add a step's gradient norm (), equal on all ranks, and local sums and counts (2, M)."""
        self._steps.append(step)
        self._rows.append(torch.cat([grad_norm.to(sums).view(1), sums.flatten()]))

    def first_non_finite(self) -> NonFinite | None:
        """First step with a non-finite gradient norm or sum of the first metrics, or None.

        They are as many as PAIR_METRICS, which are the first ones of objectives on data.
        """
        if not self._rows:
            return None
        for step, row in zip(self._steps, self.state_dict()[1].tolist(), strict=True):
            sums = zip(self._names[: len(PAIR_METRICS)], row[1:], strict=False)
            for metric, value in (*sums, ("grad_norm", row[0])):
                if not math.isfinite(value):
                    return NonFinite(step, metric, value)
        return None

    def drop_last(self) -> None:
        """Remove the last step."""
        steps, rows = self.state_dict()
        self.load_state_dict(steps[:-1], rows[:-1])

    def flush(self) -> Metrics:
        """Return the mean metrics and gradient norm ({} if there was no step); clear the window."""
        rows = self.state_dict()[1]
        self.load_state_dict([], rows[:0])
        if not len(rows):
            return {}
        return {
            **means(rows[:, 1:].sum(0).view(2, -1), self._names),
            "grad_norm": rows[:, 0].mean().item(),
        }

    def state_dict(self) -> tuple[list[int], Tensor]:
        """Steps and their all-reduced rows on the host, for a checkpoint."""
        if self._reduced < len(self._rows):
            local = torch.stack(self._rows[self._reduced :])
            totals = distributed.all_reduce_sum_(local.clone())
            # The gradient norm is already the same on all ranks.
            totals[:, 0] = local[:, 0]
            self._rows[self._reduced :] = totals.cpu()
            self._reduced = len(self._rows)
        empty = torch.zeros(0, 1 + 2 * len(self._names), dtype=torch.float64)
        return self._steps, torch.stack(self._rows) if self._rows else empty

    def load_state_dict(self, steps: list[int], rows: Tensor) -> None:
        """Continue from the result of `state_dict`."""
        self._steps, self._rows, self._reduced = list(steps), list(rows), len(rows)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB, the maximum over ranks: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return distributed.all_reduce_max(torch.cuda.max_memory_allocated(device) / 2**30)
    return distributed.all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
