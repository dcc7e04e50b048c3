"""The rows of `fastpref bench --quick` for pytest-benchmark: `pytest benchmarks`.

Rounds here are pytest-benchmark's: one implementation after the other, not in turns. Use
`fastpref bench` for numbers to compare.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastpref.bench import contestants, problems
from fastpref.bench.contestants import Implementation
from fastpref.bench.problems import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [
    (problem, implementation)
    for problem in problems.shape_problems(problems.QUICK_SHAPES[DEVICE], DEVICE)
    for implementation in contestants.implementations(DEVICE, tuple(contestants.PACKAGES))
    if implementation.serves(problem)
]


@pytest.mark.parametrize(
    ("problem", "implementation"),
    ROWS,
    ids=[f"{problem.op}-{problem.head}-{peer.name}".replace(" ", "_") for problem, peer in ROWS],
)
def test_row(benchmark: BenchmarkFixture, problem: Problem, implementation: Implementation) -> None:
    if why := contestants.unavailable_reason(implementation, problem, DEVICE):
        pytest.skip(why)
    benchmark.group = f"{problem.op}, {problem.head}"
    run = contestants.prepare(implementation, problem, problems.make_inputs(problem, DEVICE))

    def finished() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(
    "problem", dict.fromkeys(p for p, _ in ROWS), ids=lambda problem: f"{problem.op}-{problem.head}"
)
def test_gemm_baseline(benchmark: BenchmarkFixture, problem: Problem) -> None:
    benchmark.group = f"{problem.op}, {problem.head}"
    inputs = problems.make_inputs(problem, DEVICE)
    run = contestants.gemm_baseline(problem, inputs, problem.gemms)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
