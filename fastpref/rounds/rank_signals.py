"""Signals to any rank end a run on all ranks, also while the first one works alone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

from fastpref import distributed
from fastpref.training import signals

T = TypeVar("T")


class RankSignals:
    """Signals of all ranks; received: those of this one, as they arrive."""

    def __init__(self, received: list[int]) -> None:
        self._received = received

    def check(self, step: int) -> None:
        """Raise Interrupted on all ranks if a signal has arrived at any; step: of the run."""
        if not distributed.all_ranks(not self._received):
            raise self._interrupted(step)

    def on_main_process(self, step: int, compute: Callable[[Callable[[], None]], T]) -> T:
        """Value that rank 0 computes alone, for all ranks.

        compute: gets a function that ends it, and with it all ranks, if a signal has arrived.
        """

        def check() -> None:
            if self._received:
                raise self._interrupted(step)

        def until_signal() -> list[T]:
            try:
                return [compute(check)]
            except signals.Interrupted:
                return []

        values = distributed.on_main_process(until_signal)
        if not values:
            self.check(step)
        return values[0]

    def _interrupted(self, step: int) -> signals.Interrupted:
        number = self._received[0] if self._received else signal.SIGTERM  # another rank's
        return signals.Interrupted(
            number,
            f"stopped by {signals.describe(number)} after step {step}; continue with resume=auto",
        )
