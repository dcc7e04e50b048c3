"""The benchmark harness: its rows, clocks, errors and reports are what they claim to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import correctness, suite
from fastpref import ops
from fastpref.bench import accuracy, contestants, memory, report, timer
from fastpref.bench import problems as rows
from fastpref.bench import runner as harness
from fastpref.bench.contestants import Implementation
from fastpref.bench.problems import Inputs, Problem
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

ROOT = Path(__file__).parents[2]
FROZEN = Problem("linear_logps", "frozen", 12, 8, 40, "float32")
TRAINED = replace(FROZEN, head="trained")
ROUNDING = 1e-5  # of fp32 log-probs near 4 and of sums of 40 terms, with room


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes minutes, and its speed says nothing.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# Rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_rows_are_well_formed(device: str, quick: bool) -> None:
    problems = rows.problems(device, quick)
    assert {p.op for p in problems} == set(rows.OPS)
    assert len(set(problems)) == len(problems)
    for problem in problems:
        assert problem.T % (2 * problem.pairs) == 0  # equally long responses
        assert problem.flops > 0 and problem.gemms.strip("LHWA") == ""
        assert getattr(torch, problem.dtype).is_floating_point
        assert any(x.serves(problem) for x in contestants.implementations(device, ()))


def test_the_sweeps_have_a_curve_in_each_direction() -> None:
    swept = [p for p in rows.sweeps("cpu", False) if p.head == "frozen"]
    assert len({p.V for p in swept if p.T == 1024}) == 4
    assert len({p.T for p in swept if p.V == 32768}) == 5
    assert {p.chunk_bytes for p in swept} == {64 << 20}


def test_necessary_flops() -> None:
    one = 2 * 12 * 8 * 40
    assert (FROZEN.flops, TRAINED.flops) == (2 * one, 3 * one)
    assert Problem("forward", "frozen", 12, 8, 40, "float32").flops == one
    # Two pairs of 2048 tokens: the Gram matrices are 2 * 3 * 1024^2 * (V + D) each.
    geometry = Problem("score_geometry", "frozen", 4096, 8192, 50000, "float32")
    gram = 2 * 6 * 1024**2 * (50000 + 8192)
    assert geometry.flops == pytest.approx(2 * 4096 * 8192 * 50000 + gram)


def test_a_packed_row_and_its_flops() -> None:
    segments = rows.packed_segments(8192)
    assert segments.tokens == 8192 and {len(group) for group in segments.groups} == {3}
    assert 400 < 8192 / len(segments.groups) < 1000
    assert [rows.packed_segments(size).groups for size in (1, 4, 12)] == [
        ((1,),),
        ((1, 1, 2),),
        ((6, 3, 3),),
    ]
    # The prompt sees 1 + 2 + ... + 6 keys, each response 7 + 8 + 9.
    assert rows.visible_pairs(rows.packed_segments(12)) == 69
    assert replace(FROZEN, op="packed_attention").flops == 7 * 2 * 8 * 69
    assert rows.attention_heads(4096) == (32, 8, 128)
    assert [rows.attention_heads(width) for width in (512, 64, 16, 12)] == [
        (4, 1, 128),
        (4, 1, 16),
        (1, 1, 16),
        (3, 3, 4),
    ]


def test_inputs_are_the_same_each_time_and_uneven() -> None:
    first, second = (rows.make_inputs(TRAINED, "cpu") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.weight.requires_grad and first.hidden.requires_grad
    assert first.grad_logps.unique().numel() == 12
    assert first.cu_seqlens.tolist() == [0, 6, 12]


# Time


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the clock: a run is its name, and takes as many seconds as its name is long."""
    calls: list[str] = []

    def tick(run: Any) -> tuple[float, str]:
        name = run()
        calls.append(name)
        return float(len(name)), name

    monkeypatch.setattr(timer, "clock", lambda device: tick)
    return calls


def test_runs_take_turns_after_a_warm_up(ticks: list[str]) -> None:
    runs = {name: lambda name=name: name for name in ("a", "bb", "c" * 11)}
    seen = []
    times, failures = timer.interleave(
        runs, "cpu", 5, "a", lambda name, result: seen.append((name, result))
    )
    assert seen == [(name, name) for name in runs]
    # c needs more than ten times the GEMM baseline and more than a second: its warm-up is all.
    assert ticks[:3] == list(runs)
    rounds = [ticks[k : k + 2] for k in range(3, len(ticks), 2)]
    assert len(rounds) == 5 and all(sorted(turns) == ["a", "bb"] for turns in rounds)
    assert ["bb", "a"] in rounds and ["a", "bb"] in rounds  # none is always after the same
    assert times == {"a": 5 * [1.0], "bb": 5 * [2.0], "c" * 11: [11.0]}
    assert not failures


def test_what_breaks_in_the_warm_up_is_named_and_not_timed(ticks: list[str]) -> None:
    def broken() -> str:
        raise RuntimeError("out of luck\nand more")

    times, failures = timer.interleave({"a": lambda: "a", "b": broken}, "cpu", 5, "a")
    assert list(times) == ["a"]
    assert failures == {"b": "RuntimeError: out of luck"}


def test_summary() -> None:
    assert timer.summary([3.0, 1.0, 9.0, 2.0, 4.0]) == {"median": 3.0, "min": 1.0, "max": 9.0}


# Errors


def errors_of(problem: Problem, logps: contestants.Logps) -> dict[str, float]:
    """Errors of an implementation whose token log-probs are those of a function."""
    inputs = rows.make_inputs(problem, "cpu")
    implementation = Implementation("made up", "torch", contestants._with_logps(logps))
    errors = accuracy.error_function(problem, inputs)
    return errors(contestants.prepare(implementation, problem, inputs)())


@pytest.mark.parametrize("op", rows.OPS)
def test_the_reference_has_no_error_but_rounding(op: str) -> None:
    problem = replace(FROZEN, op=op)
    inputs = rows.make_inputs(problem, "cpu")
    (plain,) = (x for x in contestants.implementations("cpu", ("torch",)) if "full" in x.name)
    errors_of = accuracy.error_function(problem, inputs)
    errors = errors_of(contestants.prepare(plain, problem, inputs)())
    assert errors and max(errors.values()) < ROUNDING
    assert ("grad_hidden" in errors) == problem.differentiable


def test_a_sample_of_a_larger_problem_has_no_error_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "SAMPLE", 5)
    monkeypatch.setattr(accuracy, "_CHUNK_BYTES", 8 * 40 * 5)  # statistics in chunks of 5 tokens
    errors = errors_of(TRAINED, lambda *x: ops.linear_logps(*x, impl="reference"))
    assert set(errors) == {"logps_max", "logps_rms", "grad_hidden", "grad_weight"}
    assert max(errors.values()) < ROUNDING


def test_a_wrong_log_prob_shows() -> None:
    shift = torch.zeros(12)
    shift[3] = 0.5
    errors = errors_of(TRAINED, lambda *x: ops.linear_logps(*x, impl="reference") + shift)
    assert errors["logps_max"] == pytest.approx(0.5, abs=ROUNDING)
    assert errors["logps_rms"] == pytest.approx(0.5 / 12**0.5, abs=ROUNDING)
    assert errors["grad_hidden"] < ROUNDING  # a constant has no gradient


def test_a_wrong_gradient_shows() -> None:
    def wrong(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logps = ops.linear_logps(hidden, weight, labels, impl="reference")
        return logps.detach() + 1.25 * (logps - logps.detach())

    errors = errors_of(TRAINED, wrong)
    assert errors["logps_max"] < ROUNDING
    assert errors["grad_hidden"] == pytest.approx(0.25, abs=ROUNDING)
    assert errors["grad_weight"] == pytest.approx(0.25, abs=ROUNDING)


def test_an_even_upstream_gradient_is_not_taken_for_an_uneven_one() -> None:
    """A sum of log-probs is compared with the gradient of the sum."""
    inputs = rows.make_inputs(TRAINED, "cpu")

    def total(x: Inputs) -> torch.Tensor:
        return ops.linear_logps(x.hidden, x.weight, x.labels, impl="reference").sum()

    implementation = Implementation("a sum", "torch", {"linear_logps": total})
    errors_of = accuracy.error_function(TRAINED, inputs)
    errors = errors_of(contestants.prepare(implementation, TRAINED, inputs)())
    assert set(errors) == {"value", "grad_hidden", "grad_weight"}
    assert max(errors.values()) < ROUNDING


# Implementations and memory


def test_settings_are_put_back() -> None:
    from fastpref.ops import chunked, cpu

    before = chunked.CHUNK_BYTES, cpu.CACHE_BYTES
    problem = replace(TRAINED, chunk_bytes=1 << 12)
    for implementation in contestants.implementations("cpu", ()):
        if implementation.serves(problem):
            contestants.prepare(implementation, problem, rows.make_inputs(problem, "cpu"))()
    with pytest.raises(RuntimeError), contestants.setting("fastpref.ops.chunked", "CHUNK_BYTES", 1):
        assert chunked.CHUNK_BYTES == 1
        raise RuntimeError
    assert before == (chunked.CHUNK_BYTES, cpu.CACHE_BYTES)


@pytest.fixture(scope="module")
def children() -> Iterator[memory.Children]:
    server = memory.Children(("torch",))
    yield server
    server.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_memory_of_full_logits_and_of_chunks(children: memory.Children) -> None:
    # 256 x 32768 fp32 logits are 32 MiB and a chunk is 4 MiB, both far above what an allocator has
    # at hand; full logits hold two to four of them at a time, chunks little more than one chunk.
    problem = Problem("linear_logps", "frozen", 256, 16, 32768, "float32", chunk_bytes=4 << 20)
    full = children.extra_bytes(problem, "torch full logits") / 2**20
    chunks = children.extra_bytes(problem, "fastpref chunked") / 2**20
    assert 60 < full < 140
    assert 3.6 < chunks < 11


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_a_child_that_fails_says_why(children: memory.Children) -> None:
    with pytest.raises(UserError, match="ValueError: impl: 'cpu'"):  # takes fp32, where built
        children.extra_bytes(replace(FROZEN, dtype="float16"), "fastpref cpu")


# The command


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path, str]]:
    """Report, path and output of a run at a tiny shape, with a peer that cannot be imported."""
    import io

    from rich.console import Console

    folder, text = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setitem(sys.modules, "cut_cross_entropy", None)
        path = harness.run(
            folder / "deep",
            Display(Console(file=text, width=120)),
            device="cpu",
            families=("torch", "cce"),
            shapes=("24,8,96",),
        )
    yield json.loads(path.read_text()), path, text.getvalue()


def test_a_run_writes_every_field(written: tuple[dict[str, Any], Path, str]) -> None:
    document, path, _ = written
    assert set(document) >= {"benchmark", "device", "threads", "versions", "commit", "peers"}
    timed = [p for p in document["points"] if "failed" not in p]
    assert {p["op"] for p in timed} == set(rows.OPS)
    for p in timed:
        assert p["rounds"] >= timer.MIN_ROUNDS
        assert p["seconds"]["min"] <= p["seconds"]["median"] <= p["seconds"]["max"]
        assert p["tflops"] > 0 and p["over_yardstick"]["median"] > 0
        assert (p["T"], p["D"], p["V"], p["dtype"]) == (24, 8, 96, "float32")
        if not p["implementation"].startswith("gemm"):
            assert isinstance(p["extra_bytes"], int) and max(p["errors"].values()) < 1e-4
    names = {p["implementation"] for p in timed if p["head"] == "trained"}
    assert {"gemm, 3 products", "fastpref chunked", "torch full logits"} <= names
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_baseline_of_a_run_without_cache_has_four_gemms(
    written: tuple[dict[str, Any], Path, str],
) -> None:
    baselines = {
        p["implementation"]: p["yardstick"]
        for p in written[0]["points"]
        if p["head"] == "trained" and "failed" not in p
    }
    if "fastpref cpu" not in baselines:
        pytest.skip("the C++ row passes were not built")
    assert baselines["fastpref cpu"] == "gemm, 3 products"
    assert baselines["fastpref cpu, no cache"] == "gemm, 4 products"
    assert baselines["gemm, 4 products"] == "gemm, 4 products"


def test_a_missing_peer_is_named(written: tuple[dict[str, Any], Path, str]) -> None:
    document, _, text = written
    reasons = {p["failed"] for p in document["points"] if p["implementation"].startswith("cce")}
    assert reasons == {"not installed: no module cut_cross_entropy"}
    lines = [line.split() for line in text.splitlines()]
    assert ["cce", *["not", "installed:", "no", "module", "cut_cross_entropy"]] in lines


def test_curves_join_points_that_differ_in_one_dimension() -> None:
    def point(T: int, V: int, **more: Any) -> dict[str, Any]:
        row = harness._row(replace(FROZEN, T=T, V=V), "fastpref cpu")
        return row | {"seconds": {"median": T * V}, "extra_bytes": 2**20 * V} | more

    points = [point(4, 40), point(4, 20), point(8, 20), point(4, 80, failed="so")]
    fixed, swept = report.sweep(points, "V")
    assert fixed == "T 4, D 8, float32"
    assert report.curves(swept, "V", "seconds") == {"fastpref cpu": [(20, 80), (40, 160)]}
    assert report.curves(swept, "V", "MiB") == {"fastpref cpu": [(20, 20), (40, 40)]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "torch,nobody"), "error: --against: expected some of torch, liger, cce"),
        (("--shape", "12,8"), "error: --shape: expected T,D,V"),
        (("--shape", "11,8,40"), "error: --shape: expected T,D,V"),
        (("--only", "attention"), "error: --only: expected one of linear_logps, forward"),
        (("--rounds", "4"), "error: --rounds: expected at least 5, got 4"),
        (("--device", "tpu"), "error: --device: expected cpu or cuda, got 'tpu'"),
        (("--out", "/proc/no"), "error: /proc/no: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastpref import cli

    monkeypatch.setattr(sys, "argv", ["fastpref", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(message) and error.count("\n") == 1


# The suite for GPUs


def test_targets_are_met_or_not_or_not_measured() -> None:
    def point(
        op: str, head: str, name: str, seconds: float, over: float, shape: int = 0
    ) -> dict[str, Any]:
        problem = Problem(op, head, *rows.CUDA_SHAPES[shape], "bfloat16")
        speed = {"seconds": {"median": seconds}, "over_yardstick": {"median": over}}
        return harness._row(problem, name) | speed | {"extra_bytes": 500_000_000}

    ours = "fastpref triton"
    points = [
        point("linear_logps", "frozen", ours, 2.0, 1.1),
        point("linear_logps", "frozen", "cce", 2.4, 1.3),
        point("linear_logps", "trained", ours, 5.0, 1.3),
        point("score_geometry", "frozen", ours, 0.1, 0.05),
        point("linear_logps", "frozen", f"{ours}, score sums", 2.125, 1.2),
        point("forward", "frozen", ours, 1.0, 1.0),
        point("linear_kl", "frozen", ours, 4.0, 1.4),
        point("linear_logps", "trained", f"{ours}, no cache", 4.0, 1.15, shape=2),
        point("linear_logps", "trained", ours, 4.0, 1.5, shape=2),
    ]
    checks = [{"dtype": "bfloat16", "met": True}, {"dtype": "bfloat16", "failed": "so"}]
    reached = {row["target"]: (row["value"], row["met"]) for row in suite.targets(points, checks)}
    assert reached["head frozen: time over its 2 products"] == (1.1, True)
    assert reached["head frozen: extra memory, MB"] == (500, True)
    assert reached["head frozen: cce's time over ours"] == (1.2, False)
    assert reached["head trained, cached: time over its 3 products"] == (1.3, False)
    assert reached["score geometry: share of the head's forward and backward"] == (0.05, True)
    assert reached["sums of a batch's scores: share of a forward pass of the head"] == (0.125, True)
    assert reached["linear_kl: time over its 3 products"] == (1.4, False)
    assert reached["trained head, V 152,064: time over its 4 products"] == (1.15, True)
    assert reached["frozen head, V 256,000: time over its 2 products"] == (None, None)
    assert "trained head, V 256,000: time over its 3 products" in reached
    assert reached["head frozen: trl's time over ours"] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_error_rule_lets_an_op_through_and_a_wrong_one_not(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of the kernels: plain chunks, and plain chunks that are a hundredth off."""
    for op, compute in correctness.OPS.items():

        def stand_in(x: Any, case: Any, impl: str, compute: Any = compute) -> Any:
            ours = impl == "triton"
            outputs = compute(x, case, "chunked" if ours else impl)
            return {k: v * factor if ours else v for k, v in outputs.items()}

        monkeypatch.setitem(correctness.OPS, op, stand_in)
        for case in correctness.DRY_CASES:
            row = correctness.check(op, case, dtype, "cpu")
            assert row["met"] == (factor == 1.0), (op, case, row)


def test_a_section_goes_on_after_a_lost_device(tmp_path: Path) -> None:
    def lost() -> dict[str, Any]:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    checks = [({"row": 0}, lost), ({"row": 1}, lambda: {"met": True}), ({"row": 2}, lost)]
    part = tmp_path / "part.json"
    part.write_text("[]")
    for done in (1, 3):
        with pytest.raises(SystemExit) as stop:
            suite.section(checks, part, float("inf"), "cpu")
        assert stop.value.code == suite.DEVICE_LOST
        assert len(json.loads(part.read_text())) == done
    suite.section([*checks, ({"row": 3}, lost)], part, 0.0, "cpu")  # its time is over
    written = json.loads(part.read_text())
    assert [row["row"] for row in written] == [0, 1, 2, 3]
    assert written[1]["met"] and written[3]["skipped"] == "out of time"


def test_the_gpu_suite_runs_on_tiny_shapes(tmp_path: Path) -> None:
    """Its orchestration, and its ablation; the other sections take minutes in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.suite", "--dry-run",
         "--sections", "ablation", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dry-run-*.json")
    document = json.loads(path.read_text())
    section = document["sections"]["ablation"]
    assert section["ended"] == "complete"
    failed = {row["part"]: row["failed"] for row in section["rows"] if "failed" in row}
    assert failed == {}
    timed = [row for row in section["rows"] if "seconds" in row]
    assert timed and all(len(row["seconds"]) > 1 and "broken" not in row for row in timed)
    assert all(row["met"] is None for row in document["targets"])
    assert "not measured" in done.stdout
