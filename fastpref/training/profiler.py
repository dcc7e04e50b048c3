"""Where the time of a training step goes: a trace to look at, and a table to read.

The parts are marked in the trainer by `part("forward")` and the like, which costs a microsecond
where nobody profiles. On CUDA the time of a part is that of its kernels on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

SKIPPED, STEPS = 3, 3  # steps before those that are measured, and these
_MARK = "fastpref: "


def part(name: str) -> record_function:
    """A context that marks a part of a step."""
    return record_function(_MARK + name)


class Profiler:
    """That of a run which is not profiled."""

    def step(self) -> None:
        """Call it after every optimizer step."""


class StepProfiler(Profiler):
    """Measures steps 4 to 6 and writes `trace.json` and `table.txt`."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        self._folder, self._cuda, self.table = folder, cuda, ""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profile = profile(
            activities=kinds,
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> StepProfiler:
        self._profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.stop()

    def step(self) -> None:
        self._profile.step()

    def _write(self, found: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / "trace.json"))
        self.table = table(found.key_averages(), self._cuda)
        (self._folder / "table.txt").write_text(self.table + "\n")


def table(averages: Any, cuda: bool, rows: int = 15) -> str:
    """Milliseconds a step of the marked parts and, below them, of the costliest operations."""
    whole = "device_time_total" if cuda else "cpu_time_total"
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    parts = {e.key: getattr(e, whole) for e in averages if e.key.startswith(_MARK)}
    ops = {e.key: getattr(e, own) for e in averages if not e.key.startswith((_MARK, "Profiler"))}
    costliest = sorted(ops, key=lambda key: -ops[key])[:rows]
    total = sum(parts.values()) or 1.0
    lines = [f"{'ms a step':>10}  {'share':>6}"]
    for name, time in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"{time / STEPS / 1e3:10.2f}  {time / total:6.1%}  {name.removeprefix(_MARK)}")
    lines.append("")
    lines += [
        f"{ops[key] / STEPS / 1e3:10.2f}  {ops[key] / total:6.1%}  {key[:70]}" for key in costliest
    ]
    return "\n".join(lines)


@contextmanager
def profiling(folder: Path | None) -> Iterator[Profiler]:
    """Profile into a folder, or not at all."""
    if folder is None:
        yield Profiler()
        return
    with StepProfiler(folder, torch.cuda.is_available()) as profiler:
        yield profiler
