"""Clock of a run that counts evaluations and exports apart from training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds since it was made, without those of the pauses."""

    def __init__(self) -> None:
        self._started, self._paused = time.monotonic(), 0.0
        self._evaluations: dict[int, float] = {}  # seconds by step

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._started - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager whose time is none of training."""
        began = self.seconds()
        try:
            yield
        finally:
            self._paused += self.seconds() - began

    def evaluated(self, step: int, began: float) -> float:
        """Count the time since `began`, a result of `seconds`, as evaluation, and return it."""
        taken = self.seconds() - began
        self._paused += taken
        # Each set of held-out data has an evaluation of its own.
        self._evaluations[step] = self._evaluations.get(step, 0.0) + taken
        return taken

    def evaluations_left(self, step: int, steps: int, every: int | None) -> float:
        """Seconds that evaluations will take; one is after the last step in any case."""
        if not self._evaluations or step >= steps:
            return 0.0
        count = 1 if every is None else -(-steps // every) - step // every
        return count * sum(self._evaluations.values()) / len(self._evaluations)
