"""Profiler of training steps that writes a trace and a table.

The trainer marks the parts of a step by `with part("backward")`, which costs a microsecond without
a profiler. On CUDA the time of a part is the GPU time of its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

# Number of warm-up steps, and of the profiled steps after them.
SKIPPED, STEPS = 3, 3
_MARK = "fastpref: "


def part(name: str) -> record_function:
    """Context manager that marks a part of a step."""
    return record_function(_MARK + name)


class Profiler:
    """No-op profiler."""

    def step(self) -> None:
        """Mark the end of an optimizer step."""


class StepProfiler(Profiler):
    """Profile steps 4 to 6 and write `trace.json` and `table.txt`."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        self._folder, self._cuda, self.table = folder, cuda, ""
        activities = [ProfilerActivity.CPU]
        if cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
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

    def _write(self, profiled: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self._folder / "trace.json"))
        self.table = table(profiled.key_averages(), self._cuda)
        (self._folder / "table.txt").write_text(self.table + "\n")


def table(averages: Any, cuda: bool, rows: int = 15) -> str:
    """Format milliseconds per step of the marked parts and of the most expensive operations."""
    total_time = "device_time_total" if cuda else "cpu_time_total"
    self_time = "self_device_time_total" if cuda else "self_cpu_time_total"
    parts = {e.key: getattr(e, total_time) for e in averages if e.key.startswith(_MARK)}
    ops = {
        e.key: getattr(e, self_time) for e in averages if not e.key.startswith((_MARK, "Profiler"))
    }
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
    """Context manager that yields a profiler, a no-op one if `folder` is None."""
    if folder is None:
        yield Profiler()
        return
    with StepProfiler(folder, torch.cuda.is_available()) as profiler:
        yield profiler
