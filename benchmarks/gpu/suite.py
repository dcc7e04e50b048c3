"""All checks and measurements that need a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu.suite [--out benchmarks/results] [--minutes 9]
    TRITON_INTERPRET=1 python -m benchmarks.gpu.suite --dry-run --out DIR      no GPU, tiny shapes

    correctness    every Triton op, bf16, fp16 and fp32, at odd shapes, against fp64
    targets        the rows of `fastpref bench --device cuda`, with all installed libraries
    ablation       the trunk's elementwise kernels, tile shapes, chunk sizes, and cuBLAS alone

Needs torch and triton; fastpref itself need not be installed. Each section runs in a process of its
own, since an illegal memory access ends a CUDA process; the checks run in several processes, since
compilation takes most of their time. No row starts after the section's share of time.
OUT/<device>-<date>.json is written after each section, and a section writes a part after each row,
so an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))  # runs without an installation, too

import torch  # noqa: E402

from benchmarks.gpu import ablation, correctness  # noqa: E402
from benchmarks.gpu.interpreter import round_to_nearest  # noqa: E402
from fastpref.bench import contestants, report, timer  # noqa: E402
from fastpref.bench import problems as rows  # noqa: E402
from fastpref.bench.problems import Problem  # noqa: E402
from fastpref.bench.runner import Bench  # noqa: E402
from fastpref.utils import environment, result_json  # noqa: E402

Row = dict[str, Any]
Check = tuple[Row, Callable[[], Any]]  # a description, and a function that returns the results

# Share of the time that is used by the end of each section.
SHARES = {"correctness": 0.4, "targets": 0.8, "ablation": 1.0}
WORKERS = {"correctness": 8}  # processes at a time; others have 1
DEVICE_LOST = 3  # exit code
LOST = "CUDA error|illegal memory access|unspecified launch failure"
OURS = "fastpref triton"
DRY_SHAPE = (16, 16, 96)
WIDE_SHAPES = rows.CUDA_SHAPES[2:]  # vocabularies that fill a chunk badly
FAMILIES = tuple(contestants.PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU as well")
    parser.add_argument("--sections", default=",".join(SHARES), help="comma-separated")
    parser.add_argument("--section", nargs=5, help=argparse.SUPPRESS)  # used by in_processes
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.section:
        name, part, deadline, worker, workers = options.section
        if device == "cpu":
            round_to_nearest()
        checks = islice(CHECKS[name](device, options.dry_run), int(worker), None, int(workers))
        section(checks, Path(part), float(deadline), device)
        return
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SHARES):
        parser.error(f"--sections: expected some of {', '.join(SHARES)}, got {unknown}")
    if device == "cpu" and not options.dry_run:
        parser.error("there is no CUDA device; with TRITON_INTERPRET=1, --dry-run works without")
    sys.exit(suite(options.out, options.minutes * 60, sections, device, options.dry_run))


def suite(out: Path, seconds: float, sections: list[str], device: str, dry: bool) -> int:
    """Run the sections, write the report after each, print the targets; 1 if a check failed."""
    started = time.time()
    described = environment.describe(device)
    slug = re.sub(r"\W+", "-", described["device"].lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    prefix = "dry-run-" if dry else ""
    path = out / f"{prefix}{slug}-{datetime.date.today()}.json"
    header = {"benchmark": "gpu_suite", **described, "peers": contestants.versions(FAMILIES)}
    results: dict[str, Any] = {}
    for name in sections:
        deadline = started + SHARES[name] * seconds
        ended, lines = in_processes(name, path, deadline, dry)
        results[name] = {"ended": ended, "rows": lines}
        measurements = results.get("targets", {}).get("rows", ())
        points = [p for row in measurements for p in row.get("points", ())]
        reached = targets(points, results.get("correctness", {}).get("rows", []), dry)
        elapsed = round(time.time() - started, 1)
        write(path, {**header, "seconds": elapsed, "targets": reached, "sections": results})
    print("\n".join(summary(results, reached)))
    print(f"{path}, {time.time() - started:.0f} s")
    met = [row.get("met") for row in results.get("correctness", {}).get("rows", ())]
    return 1 if False in met else 0


def in_processes(name: str, path: Path, deadline: float, dry: bool) -> tuple[str, list[Row]]:
    """Run a section; return "complete" or the reason why it ended early, and its rows."""
    count = 1 if dry else WORKERS.get(name, 1)
    parts = [path.with_suffix(f".{name}-{index}.json") for index in range(count)]
    commands = []
    for index, part in enumerate(parts):
        write(part, [])
        arguments = [name, str(part), str(deadline), str(index), str(count)]
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.gpu.suite",
            "--section",
            *arguments,
        ]
        commands.append([*command, *(["--dry-run"] if dry else [])])
    workers = [subprocess.Popen(command) for command in commands]
    ends = set()
    for worker, command in zip(workers, commands, strict=True):
        while (end := ended(worker, deadline + 20)) == f"exit code {DEVICE_LOST}":
            worker = subprocess.Popen(command)  # continues after the rows in its part
        ends |= {end} - {"complete"}
    shares = [json.loads(part.read_text()) for part in parts]
    for part in parts:
        part.unlink()
    dealt = (row for turn in zip_longest(*shares) for row in turn if row is not None)
    return ", ".join(sorted(ends)) or "complete", list(dealt)


def ended(worker: subprocess.Popen[bytes], deadline: float) -> str:
    """Wait for a worker until the deadline; return "complete", or the reason why it ended."""
    try:
        code = worker.wait(timeout=max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return "killed 20 s after its time"
    return "complete" if code == 0 else f"exit code {code}"


def section(checks: Iterable[Check], part: Path, deadline: float, device: str) -> None:
    """Run rows in this process until the deadline, and write each to `part` before the next.

    Rows that `part` has are not run again. Exits with DEVICE_LOST after an error after which every
    call to CUDA in this process fails.
    """
    done: list[Row] = json.loads(part.read_text())
    for row, check in islice(checks, len(done), None):
        if time.time() > deadline:
            done.append({**row, "skipped": "out of time"})
        else:
            start = time.perf_counter()
            try:
                row = row | check()
            except Exception as error:
                row = row | {"failed": contestants.reason(error)}
            done.append({**row, "took": round(time.perf_counter() - start, 2)})
        write(part, done)
        if re.search(LOST, json.dumps(done[-1])):
            sys.exit(DEVICE_LOST)
        timer.release(device)


def write(path: Path, document: Any) -> None:
    """Write a file atomically, since a worker may be killed while it writes."""
    draft = path.with_suffix(".draft")
    draft.write_text(result_json.dumps(document))
    draft.replace(path)


def measured(device: str, dry: bool) -> Iterator[Check]:
    """The rows of `fastpref bench` on CUDA, one for each problem."""
    if dry:
        problems = rows.shape_problems((DRY_SHAPE,), device)
    else:
        shapes = rows.shape_problems(rows.CUDA_SHAPES[:1], device)
        # First the rows that the targets need.
        shapes += rows.shape_problems(WIDE_SHAPES, device, ("linear_logps",))
        shapes += rows.sweeps(device, quick=False)[:4]
        problems = list(dict.fromkeys([*shapes, *rows.problems(device, quick=False)]))
    with Bench(device, FAMILIES, timer.MIN_ROUNDS) as bench:
        for problem in problems:
            yield asdict(problem), partial(_measure, bench, problem)


def _measure(bench: Bench, problem: Problem) -> Row:
    points = bench.measure(problem)
    print("\n".join(report.table(points)), flush=True)
    return {"points": points}


CHECKS: dict[str, Callable[[str, bool], Iterator[Check]]] = {
    "correctness": correctness.checks,
    "targets": measured,
    "ablation": ablation.ablation,
}


def targets(points: list[Row], checks: list[Row], dry: bool = False) -> list[Row]:
    """Each target, the value reached, and whether that meets it; None if it was not measured."""
    from fastpref_kernels.linear_logps import CACHE_BYTES

    T, D, V = DRY_SHAPE if dry else rows.CUDA_SHAPES[0]
    logps, trained = "linear_logps frozen", "linear_logps trained"

    def point(row: str, name: str, **shape: int) -> Row:
        values = {"T": T, "D": D, "V": V, **shape, "implementation": name}
        for p in points:
            matches = all(p[key] == value for key, value in values.items())
            if matches and f"{p['op']} {p['head']}" == row:
                return p
        return {}

    def seconds(row: str, name: str = OURS) -> float | None:
        return point(row, name).get("seconds", {}).get("median")

    def over(row: str, name: str = OURS, **shape: int) -> float | None:
        return (point(row, name, **shape).get("over_yardstick") or {}).get("median")

    def extra(**shape: int) -> float | None:
        size = point(logps, OURS, **shape).get("extra_bytes")
        return None if size is None else size / 1e6

    swept = rows.sweeps("cuda", quick=False)[0]
    few, many = (extra(T=swept.T, D=swept.D, V=V) for V in (swept.V, 8 * swept.V))
    with_sums, without, forward = (
        seconds(logps, f"{OURS}, score sums"), seconds(logps), seconds("forward frozen")
    )  # fmt: skip
    sums = None if with_sums is None or without is None else max(with_sums - without, 0.0)
    wide: list[tuple[str, float | None, str, float]] = []
    for t, d, v in WIDE_SHAPES:
        # In bf16; a trained head whose dlogits do not fit into the cache takes four products.
        count, name = (3, OURS) if 2 * t * v <= CACHE_BYTES else (4, f"{OURS}, no cache")
        for head, products, value in (
            ("frozen", 2, over(logps, T=t, D=d, V=v)),
            ("trained", count, over(trained, name, T=t, D=d, V=v)),
        ):
            text = f"{head} head, V {v:,}: time over its {products} products"
            wide.append((text, value, "<=", 1.20))
    exact = [row["met"] for row in checks if row.get("dtype") == "bfloat16" and "met" in row]
    padded, attention = "dpo_padded frozen", "packed_attention frozen"
    table = [
        ("head frozen: time over its 2 products", over(logps), "<=", 1.20),
        ("head frozen: extra memory, MB", extra(), "<=", 600),
        ("DPO, padded batch: liger's time over ours", _ratio(seconds(padded, "liger DPO") or
         seconds(padded, "liger DPO, eager"), seconds(padded)), ">=", 2),
        ("head frozen: cce's time over ours", _ratio(seconds(logps, "cce"), seconds(logps)),
         ">=", 1.3),
        ("head frozen: trl's time over ours",
         _ratio(seconds(logps, "trl chunked log-prob"), seconds(logps)), ">=", 1.3),
        ("head trained, cached: time over its 3 products", over(trained), "<=", 1.20),
        ("head trained, no cache: time over its 4 products", over(trained, f"{OURS}, no cache"),
         "<=", 1.25),
        ("forward only: time over its product", over("forward frozen"), "<=", 1.20),
        ("score geometry: share of the head's forward and backward",
         _ratio(seconds("score_geometry frozen"), seconds(logps)), "<=", 0.05),
        ("sums of a batch's scores: share of a forward pass of the head", _ratio(sums, forward),
         "<=", 0.15),
        ("linear_kl: time over its 3 products", over("linear_kl frozen"), "<=", 1.30),
        *wide,
        ("packed attention: FlexAttention's time over ours",
         _ratio(seconds(attention, "torch FlexAttention"), seconds(attention)), ">=", 1.3),
        ("memory at V 256k over V 32k", _ratio(many, few), "<=", 1.3),
        ("bf16 checks that keep to the error rule", _ratio(sum(exact), len(exact)), ">=", 1),
    ]  # fmt: skip
    return [
        {
            "target": name,
            "value": value,
            "limit": f"{sign} {limit}",
            "met": _met(value, sign, limit),
        }
        for name, value, sign, limit in table
    ]


def _met(value: float | None, sign: str, limit: float) -> bool | None:
    if value is None:
        return None
    return value <= limit if sign == "<=" else value >= limit


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def summary(results: dict[str, Any], reached: list[Row]) -> list[str]:
    """The last lines of the output, the most important ones last."""
    lines = ["", "failed:"]
    for name, part in results.items():
        lines += [f"  {name}: {line}"[:200] for row in part["rows"] if (line := failure(row))]
    for name, part in results.items():
        skipped = sum("skipped" in row for row in part["rows"])
        lines.append(
            f"{name}: {len(part['rows'])} rows, {skipped} of them skipped, {part['ended']}"
        )
    lines += [line for row in results.get("ablation", {}).get("rows", ()) for line in tuning(row)]
    lines += ["", f"{'target':58} {'value':>8} {'limit':>8}"]
    for row in reached:
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        lines.append(f"{row['target']:58} {value:>8} {row['limit']:>8}  {verdict}")
    return lines


def failure(row: Row) -> str:
    """Description of a row and the reason why it failed; empty if it did not."""
    why = row.get("failed", "")
    if row.get("met") is False:
        bad = {k: e for k, e in row["errors"].items() if not e["error"] <= e["allowed"]}
        why = ", ".join(f"{k} {e['error']:.1e} > {e['allowed']:.1e}" for k, e in bad.items())
    outcomes = ("errors", "met", "took", "failed")
    description = " ".join(str(v) for k, v in row.items() if k not in outcomes)
    return f"{description}: {why}" if why else ""


def tuning(row: Row) -> list[str]:
    """Lines for a row of the ablation."""
    lines = [f"  {name[:76]:76} {ms:8.3f}" for name, ms in row.get("kernels", {}).items()]
    key, unit = ("tflops", "TFLOP/s") if "tflops" in row else ("gigabytes", "GB/s")
    lines += [
        f"  {name:44} {seconds['median'] * 1000:8.3f} ms {row[key][name]:7.1f} {unit}"
        for name, seconds in row.get("seconds", {}).items()
    ]
    return [row["part"], *lines] if lines else []


if __name__ == "__main__":
    main()
