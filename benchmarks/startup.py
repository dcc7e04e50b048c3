"""Where the seconds of a short run go beside its steps.

    python -m benchmarks.startup --model FOLDER --data PAIRS.jsonl [--before CHECKOUT] [--rounds 2]

A whole process of `fastpref train`: LoRA of rank 16 on all linear layers, fp32, the first 12 pairs
of a file, at most 512 tokens each, in steps of 4, and an export. Every run has an empty cache. CPU
seconds (user and system) of its parts are measured, which other processes on the machine change
less than the time on the clock; the least of all rounds counts, part by part.

--before: a checkout of another commit, with its library built (`pip install -e`). The commits take
turns.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.json"
PAIRS, IMPORTS, STEPS = 12, "imports", "the steps"
# Part of a run, and the functions that are its time.
PARTS = {
    "tokenizer and data": [("training.setup", "tokenizer_of"), ("training.setup", "load_data")],
    "model and adapter": [("training.setup", "load_policy")],
    "comparisons of layouts": [
        ("training.setup", "choose_layout"),
        ("training.trainer", "check_after_training"),
    ],
    "reference": [
        ("model.reference_policy", "_key"),
        ("model.reference_policy", "saved_reference"),
    ],
    STEPS: [("training.trainer", "Trainer._train_step")],
    "export": [("training.exports", "Exporter.write")],
}
Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a small chat model")
    parser.add_argument("--data", type=Path, help="JSONL of pairs")
    parser.add_argument("--before", type=Path, help="checkout of another commit")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # config of a measured process
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(measure(options.run)))
        return
    checkouts = {"now": ROOT} if options.before is None else {"before": options.before, "now": ROOT}
    runs: dict[str, list[Any]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(_process(checkout.resolve(), options))
            print(f"{name}: {json.dumps(runs[name][-1])}", flush=True)
    # Not before a measured process has imported its own.
    from fastpref.utils import environment, result_json

    described = {**environment.describe("cpu"), "threads": options.threads}
    result = {"benchmark": "startup", **described, "rounds": options.rounds, "runs": runs}
    options.out.write_text(result_json.dumps(result) + "\n", encoding="utf-8")
    print(table(result))


def _process(checkout: Path, options: argparse.Namespace) -> Any:
    """Run a process of a checkout and return what `measure` prints in it."""
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        lines = options.data.read_text(encoding="utf-8").splitlines()[:PAIRS]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {
            "model": {"path": str(options.model.resolve()), "dtype": "float32"},
            "data": {"train": "pairs.jsonl", "max_length": 512, "cache": "cache"},
            "loss": "dpo",
            "adapter": {"name": "lora", "r": 16, "target_modules": "all-linear"},
            "training": {"epochs": 1, "batch_size": 4, "output_dir": "run", "device": "cpu"},
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        variables = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(options.threads)}
        # -P: modules beside this file stay out of the way.
        command = [sys.executable, "-P", "-W", "ignore", __file__, "--run", "config.yaml"]
        output = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            text=True,
        ).stdout
    return json.loads(output.splitlines()[-1])


def measure(config: Path) -> dict[str, Any]:
    """CPU seconds of each part of a run, seconds on the clock, and peak memory."""
    began = time.perf_counter()
    from rich.console import Console

    from fastpref.config import load
    from fastpref.training.trainer import train
    from fastpref.utils.progress import Display

    parts: Numbers = {IMPORTS: cpu_seconds()} | dict.fromkeys(PARTS, 0.0)
    for part, functions in PARTS.items():
        for module, name in functions:
            _count(parts, part, module, name)
    train(load(config), Display(Console(quiet=True)))
    total = cpu_seconds()
    return {
        "cpu_seconds": {**parts, "the rest": total - sum(parts.values())},
        "seconds": time.perf_counter() - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cpu_seconds() -> float:
    """CPU seconds of this process since its start."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _count(parts: Numbers, part: str, module: str, name: str) -> None:
    """Add the CPU seconds of a function to a part from now on."""
    owner: Any = importlib.import_module(f"fastpref.{module}")
    *path, name = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        began = cpu_seconds()
        try:
            return function(*arguments, **options)
        finally:
            parts[part] += cpu_seconds() - began

    setattr(owner, name, counted)


def table(result: Any) -> str:
    """CPU seconds of each part in the compared commits."""
    from fastpref.docgen import markdown

    names = list(result["runs"])
    least = {name: _least(runs) for name, runs in result["runs"].items()}
    beside = {name: sum(parts.values()) - parts[STEPS] for name, parts in least.items()}
    rows = [
        [part, *(f"{least[name][part]:.1f}" for name in names)]
        for part in least[names[0]]
        if part != STEPS
    ]
    rows.append(["**beside the steps**", *(f"{beside[name]:.1f}" for name in names)])
    rows.append([STEPS, *(f"{least[name][STEPS]:.1f}" for name in names)])
    peaks = {name: max(run["peak_mib"] for run in result["runs"][name]) for name in names}
    rows.append(["peak memory, MiB", *(f"{peaks[name]:,.0f}" for name in names)])
    return markdown.table(["CPU seconds", *names], rows)


def _least(runs: list[Any]) -> Numbers:
    parts = runs[0]["cpu_seconds"]
    return {part: min(run["cpu_seconds"][part] for run in runs) for part in parts}


if __name__ == "__main__":
    main()
