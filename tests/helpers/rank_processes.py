"""Processes that meet as ranks, for the tests of what several of them do."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes


def start(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, port, *arguments)` in `count` processes, forked from one that has imported.

    They are not forked from the process of the tests, whose threads they would lack.
    """
    multiprocessing.set_forkserver_preload(["fastpref.training.trainer", "pytest"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(work, (port, *arguments), nprocs=count, start_method="forkserver")
