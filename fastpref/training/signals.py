"""SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run; `signum` says which."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def collecting() -> Iterator[list[int]]:
    """The signals received so far: at most one, for a second one acts as usual, at once."""
    received: list[int] = []
    usual: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    for number in (signal.SIGTERM, signal.SIGINT):
        usual[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
