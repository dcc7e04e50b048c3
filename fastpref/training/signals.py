"""Handlers of SIGTERM and Ctrl-C, which end a run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The signal `signum` ended the run."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def raising() -> Iterator[None]:
    """Context manager in which SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, "interrupted")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def collecting(received: list[int] | None = None) -> Iterator[list[int]]:
    """Context manager that yields a list of the received signals: `received`, or a new one.

    The first signal is added to the list and restores the previous handlers, so that a second one
    ends the process immediately.
    """
    received = [] if received is None else received
    previous_handlers: dict[int, Any] = {}

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def record(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore_handlers()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous_handlers[number] = signal.signal(number, record)
    try:
        yield received
    finally:
        restore_handlers()
