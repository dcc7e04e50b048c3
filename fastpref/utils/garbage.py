"""Python's garbage collector while a run takes its steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_collection() -> Iterator[None]:
    """Context manager in which garbage is collected only by calls of `gc.collect`.

    Automatic collections pause ranks at different times and stall collectives. Objects that exist
    already are frozen, so that no collection looks at them; if the program has frozen objects
    itself, its choice stays.
    """
    is_ours, was_enabled = gc.get_freeze_count() == 0, gc.isenabled()
    if is_ours:
        gc.collect()
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        if is_ours:
            gc.unfreeze()
