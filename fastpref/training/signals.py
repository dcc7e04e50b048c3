"""Handlers of signals, which end a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# A second one of these ends the process at once.
_URGENT = (signal.SIGTERM, signal.SIGINT)
# From a terminal that closes, which may send it twice, and from schedulers as an early warning.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """The signal `signum` ended the run."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def raising() -> Iterator[None]:
    """Context manager in which signals raise Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, "interrupted")

    previous = _set((signal.SIGTERM, *_WARNINGS), stop)
    try:
        yield
    finally:
        _restore(previous)


@contextmanager
def collecting(received: list[int] | None = None) -> Iterator[list[int]]:
    """Context manager that yields a list of the received signals: `received`, or a new one.

    The first signal is added to the list, and rank 0 says what follows. A second SIGTERM or Ctrl-C
    ends the process immediately.
    """
    received = [] if received is None else received

    def record(signum: int, frame: FrameType | None) -> None:
        if signum in _URGENT:
            _restore({number: previous[number] for number in _URGENT if number in previous})
            signal.signal(signal.SIGINT, _interrupt)
        if not received:
            received.append(signum)
            _say(
                f"{signal.Signals(signum).name}: the run ends after this step, with a checkpoint; "
                "a second Ctrl-C or SIGTERM ends it at once"
            )

    previous = _set((*_URGENT, *_WARNINGS), record)
    try:
        yield received
    finally:
        _restore(previous)


def describe(signum: int) -> str:
    """Name of a signal, and what it means if that is not plain."""
    why = {signal.SIGPIPE: " (the output was closed)", signal.SIGHUP: " (the terminal was closed)"}
    number = signal.Signals(signum)
    return number.name + why.get(number, "")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _say("ended before the checkpoint of this step; resume=auto continues from the last one")
    raise KeyboardInterrupt


def _set(numbers: tuple[signal.Signals, ...], handler: Any) -> dict[signal.Signals, Any]:
    """Set a handler of signals, and return the previous ones; nohup ignores SIGHUP, which stays."""
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in _WARNINGS:
        if previous.get(number) == signal.SIG_IGN:
            del previous[number]
    for number in previous:
        signal.signal(number, handler)
    return previous


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _say(text: str) -> None:
    """Write a line without the buffers of Python, which the handler may have interrupted."""
    # Imported by then; every command imports this module, and few need torch.
    from fastpref import distributed

    if distributed.is_main_process():
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())
