"""`fastpref bench`: choose the problems, measure each of them, write and show the results."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.bench import accuracy, contestants, memory, report, timer
from fastpref.bench import problems as rows
from fastpref.bench.contestants import Implementation
from fastpref.bench.problems import Inputs, Problem, make_inputs, small
from fastpref.utils import environment
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

Point = dict[str, Any]  # a row and its measurements, as in the JSON file


def run(
    out: Path,
    display: Display,
    *,
    device: str | None = None,
    quick: bool = False,
    families: tuple[str, ...] = tuple(contestants.PACKAGES),
    shapes: Sequence[str] = (),
    ops: Sequence[str] = (),
    rounds: int = timer.MIN_ROUNDS,
) -> Path:
    """Measure, write `bench-<device>-<date>.json` and `.png` to `out`, and return the JSON's path.

    The file is written again after each problem. Raises UserError for a device that is not there,
    an unknown op, an invalid shape, and fewer than MIN_ROUNDS rounds.
    """
    device = check_device(device)
    problems = choose(device, quick, shapes, ops)
    if rounds < timer.MIN_ROUNDS:
        raise UserError(f"--rounds: expected at least {timer.MIN_ROUNDS}, got {rounds}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"bench-{device}-{datetime.date.today()}.json"
    header = {
        "benchmark": "bench",
        **environment.describe(device),
        "peers": contestants.versions(families),
        "settings": {"quick": quick, "rounds": rounds, "sample": accuracy.SAMPLE},
    }
    # An unwritable folder fails now, not after an hour of measuring.
    report.write(path, header, [])
    points: list[Point] = []
    display.phase("bench", len(problems))
    with Bench(device, families, rounds) as bench:
        for done, problem in enumerate(problems, 1):
            measured = bench.measure(problem)
            points += measured
            display.note("\n".join(report.table(measured)))
            display.advance(done)
            report.write(path, header, points)
    picture = report.draw(points, path.with_suffix(".png"))
    display.note(f"\nnumbers: {path}\npicture: {picture}")
    return path


class Bench:
    """Measures problems on one device: fastpref, the GEMM baseline, and other libraries."""

    def __init__(self, device: str, families: tuple[str, ...], rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.implementations = contestants.implementations(device, families)
        self._families = families
        self._too_slow: list[tuple[str, Problem]] = []
        self._unavailable_reasons: dict[tuple[str, Problem], str] = {}
        self._children: memory.Children | None = None

    def __enter__(self) -> Bench:
        if self.device == "cpu":
            self._children = memory.Children(self._families)
        return self

    def __exit__(self, *_: object) -> None:
        if self._children is not None:
            self._children.close()

    def measure(self, problem: Problem) -> list[Point]:
        """A point for each implementation that has the op, even if it cannot run here."""
        serving = [x for x in self.implementations if x.serves(problem)]
        failures = {x.name: why for x in serving if (why := self._unavailable_reason(x, problem))}
        available = {x.name: x for x in serving if x.name not in failures}
        timer.release(self.device)
        inputs = make_inputs(problem, self.device)
        runs = _gemm_baselines(problem, inputs, available.values())
        runs |= {name: contestants.prepare(x, problem, inputs) for name, x in available.items()}
        errors: dict[str, accuracy.Errors] = {}
        errors_of = accuracy.error_function(problem, inputs)

        def inspect(name: str, result: Tensor | None) -> None:
            if result is not None:  # a GEMM baseline has no result
                errors[name] = errors_of(result)

        times, failed = timer.interleave(
            runs, self.device, self.rounds, gemm_baseline(problem.gemms), inspect
        )
        points = []
        for name, seconds in times.items():
            baseline = name
            if name in available:
                baseline = gemm_baseline(available[name].gemms or problem.gemms)
            point = _row(problem, name) | _speed(problem, seconds, times.get(baseline), baseline)
            if name in available:
                point |= {"errors": errors[name]}
                point |= self._memory(problem, name, runs[name], inputs, len(seconds))
            points.append(point)
        self._too_slow += [(name, problem) for name, t in times.items() if len(t) == 1]
        failures |= failed
        return points + [_row(problem, name) | {"failed": why} for name, why in failures.items()]

    def _unavailable_reason(self, implementation: Implementation, problem: Problem) -> str:
        for name, slow in self._too_slow:
            # Its time over that of the GEMMs does not fall with more logits or a smaller D.
            alike = (slow.op, slow.head, name) == (problem.op, problem.head, implementation.name)
            if alike and slow.D >= problem.D and slow.T * slow.V <= problem.T * problem.V:
                return f"over {timer.TOO_SLOW} times the GEMMs at T {slow.T}, V {slow.V} already"
        key = implementation.name, small(problem)
        if key not in self._unavailable_reasons:
            self._unavailable_reasons[key] = contestants.unavailable_reason(
                implementation, problem, self.device
            )
        return self._unavailable_reasons[key]

    def _memory(
        self, problem: Problem, name: str, run: timer.Run, inputs: Inputs, rounds: int
    ) -> Point:
        """`extra_bytes` of a row, or the reason why it has none."""
        if rounds == 1:
            return {"extra_bytes": None, "memory_failed": "too slow to run again"}
        try:
            if self._children is not None:
                return {"extra_bytes": self._children.extra_bytes(problem, name)}
            inputs.hidden.grad = inputs.weight.grad = None
            outputs = partial(memory.output_bytes, inputs)
            return {"extra_bytes": timer.cuda_extra_bytes(run, outputs)}
        except Exception as error:
            return {"extra_bytes": None, "memory_failed": contestants.reason(error)}


def gemm_baseline(letters: str) -> str:
    """Name of the row of a GEMM baseline, e.g. "gemm, 2 products"."""
    plural = "s" if len(letters) > 1 else ""
    return f"gemm, {len(letters)} product{plural}"


def _gemm_baselines(
    problem: Problem, inputs: Inputs, implementations: Iterable[Implementation]
) -> dict[str, timer.Run]:
    """The problem's GEMM baseline, and those of implementations that have another, by name."""
    baselines = [problem.gemms, *(x.gemms for x in implementations if x.gemms)]
    return {
        gemm_baseline(letters): contestants.gemm_baseline(problem, inputs, letters)
        for letters in dict.fromkeys(baselines)
    }


def check_device(device: str | None) -> str:
    """The given device, or by default CUDA if there is one; UserError for one that is not there."""
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is asked for, but torch finds no CUDA device; use cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def choose(device: str, quick: bool, shapes: Sequence[str], ops: Sequence[str]) -> list[Problem]:
    """Problems of a command; UserError for an unknown op or an invalid shape."""
    for op in ops:
        if op not in rows.OPS:
            raise UserError(f"--only: expected one of {', '.join(rows.OPS)}, got {op!r}")
    if shapes:
        problems = rows.shape_problems(tuple(_shape(text) for text in shapes), device)
    else:
        problems = rows.problems(device, quick)
    return [problem for problem in problems if not ops or problem.op in ops]


def _shape(text: str) -> tuple[int, int, int]:
    try:
        T, D, V = (int(part) for part in text.split(","))
    except ValueError:
        T = D = V = 0
    if min(T, D, V) < 1 or T % (2 * max(1, T // rows.PAIR_TOKENS)):
        raise UserError(
            f"--shape: expected T,D,V, whole numbers such as 2048,512,32000, with T an even number "
            f"of equally long responses, got {text!r}"
        )
    return T, D, V


def _row(problem: Problem, implementation: str) -> Point:
    return {**asdict(problem), "implementation": implementation}


def _speed(
    problem: Problem, seconds: list[float], baseline: list[float] | None, baseline_name: str
) -> Point:
    summary = timer.summary(seconds)
    ratios = None
    if baseline:
        gemms = timer.summary(baseline)
        ratios = {key: summary[key] / gemms[key] for key in ("median", "min")}
    return {
        "rounds": len(seconds),
        "seconds": summary,
        "tflops": problem.flops / summary["median"] / 1e12,
        "yardstick": baseline_name,
        "over_yardstick": ratios,
    }
