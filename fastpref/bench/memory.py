"""Extra memory of one forward and backward pass on a CPU (Linux).

The peak resident memory of a process that does nothing else, minus its resident memory just before
(libraries warmed up, inputs allocated), minus its outputs.

Imports take seconds, so one server process imports everything, tries each implementation once on a
small input and forks a child for each measurement: the child's allocator is free of earlier ones.
The server computes on one thread, since a thread pool does not survive a fork.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.bench import contestants
from fastpref.bench.contestants import Implementation
from fastpref.bench.problems import Inputs, Problem, make_inputs
from fastpref.utils.errors import UserError

_STATUS = Path("/proc/self/status")


class Children:
    """The server process that forks a child for each measurement; `close` ends it."""

    def __init__(self, families: tuple[str, ...]) -> None:
        code = "from fastpref.bench.memory import serve; serve()"
        path = os.pathsep.join(entry or os.curdir for entry in sys.path)
        self._families = families
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )

    def close(self) -> None:
        self._server.communicate()

    def extra_bytes(self, problem: Problem, implementation: str) -> int:
        """Measure one implementation; raises UserError with the reason if the child fails."""
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        request = {
            "problem": asdict(problem),
            "implementation": implementation,
            "families": self._families,
            "threads": torch.get_num_threads(),
        }
        try:
            print(json.dumps(request), file=server.stdin, flush=True)
            answer: dict[str, Any] = json.loads(server.stdout.readline())
        except (OSError, ValueError):
            raise UserError("the measuring process has ended") from None
        if "bytes" not in answer:
            raise UserError(answer["failed"])
        return int(answer["bytes"])


def output_bytes(inputs: Inputs, result: Tensor) -> int:
    """Bytes of the result and of the gradients."""
    return sum(x.nbytes for x in inputs.gradients) + result.nbytes


def serve() -> None:
    """Answer each line of JSON on stdin with one on stdout, from a forked child."""
    torch.set_num_threads(1)
    tried: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        problem = Problem(**request["problem"])
        candidates = contestants.implementations("cpu", tuple(request["families"]))
        (implementation,) = (x for x in candidates if x.name == request["implementation"])
        if implementation.name not in tried:
            tried.add(implementation.name)
            contestants.unavailable_reason(implementation, problem, "cpu")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(request["threads"])
            os.write(1, (json.dumps(_measure(implementation, problem)) + "\n").encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"failed": f"the measuring process ended with {code}"}), flush=True)


def _measure(implementation: Implementation, problem: Problem) -> dict[str, Any]:
    try:
        # A fork drops the pages of libraries; this call brings them back before the measurement.
        contestants.unavailable_reason(implementation, problem, "cpu")
        inputs = make_inputs(problem, "cpu")
        run = contestants.prepare(implementation, problem, inputs)
        _reset_peak()
        before = _resident("VmRSS")
        result = run()
        extra = _resident("VmHWM") - before - output_bytes(inputs, result)
        # Small outputs can fit into memory that the process has already, below 0 in total.
        return {"bytes": max(0, extra)}
    except Exception as error:
        return {"failed": contestants.reason(error)}


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # The peak then counts from the fork: no difference, as inputs are made without temporaries.
        return


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise UserError(f"{_STATUS} has no {field}: memory is measured on Linux only")
    return int(match[1]) * 1024
