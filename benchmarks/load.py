"""Load test: time and memory of many rows, long responses, wide groups and many steps.

    python -m benchmarks.load [--only rows|long|groups|steps] [--scale 0.01] [--out FILE]

Each part generates data, runs it in processes of its own, and records their memory and open files.
Words are drawn from 20,000 with the frequencies of Zipf's law, and a byte-level BPE of 8,000 tokens
is trained on some of them. Models are tiny, so that the measurements show everything around them.

    rows    20,000 and 200,000 pairs are tokenized and one epoch is planned: seconds and memory
    long    training on pairs of two responses of 32k tokens
    groups  10,000 groups of 16 responses: tokenized, planned, trained on
    steps   a run of 50,000 steps with a line of metrics for each, and its report: step time, memory
            and open files of the last tenth compared with those of the second

Prints a line for each part, with a check of its limits; the exit code is 1 if one is exceeded.
Parts of the result file that are not measured stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import yaml

from fastpref import config as configs
from fastpref import metrics
from fastpref.data import bpe
from fastpref.data.batch_plan import Plan, tokens_of
from fastpref.data.dataset import load_groups
from fastpref.data.tokenizers import tokenizer_of
from fastpref.utils import environment, result_json
from fastpref.utils.atomic_files import replacing

RESULTS = Path(__file__).parent / "results" / "load.json"
FASTPREF = [sys.executable, "-W", "ignore", "-m", "fastpref"]
MICRO_BATCH_TOKENS = 16384
MIB, SEED, VOCABULARY, MOST_POSITIONS = 2**20, 0, 8000, 65_536
Values = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=tuple(PARTS), action="append")
    parser.add_argument("--scale", type=float, default=1.0, help="of rows, groups and steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # for a watched process
    options = parser.parse_args()
    if options.plan is not None:
        print(json.dumps(tokenize_and_plan(options.plan)))
        return
    failed = False
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="load-") as folder:
            result = PARTS[name](Work(Path(folder)), options.scale)
        failed |= not result["within_limits"]
        print(f"{name}: {json.dumps(result)}", flush=True)
        report = json.loads(options.out.read_text()) if options.out.exists() else {}
        command = shlex.join(
            ["python", "-m", "benchmarks.load", "--only", name, "--scale", f"{options.scale:g}"]
        )
        described = {**environment.describe("cpu"), "processors": os.cpu_count()}
        report |= {"benchmark": "load", name: {**described, "command": command, **result}}
        with replacing(options.out) as temporary:
            temporary.write_text(result_json.dumps(report))
    sys.exit(failed)


class Watched(NamedTuple):
    """Memory and open files of a process and its children, sampled several times a second."""

    seconds: float
    output: str
    memory: list[int]  # bytes, resident
    files: list[int]  # open

    @property
    def peak_mib(self) -> int:
        return round(max(self.memory) / MIB)


class Work:
    """A folder with a tokenizer, data files and configs, and the processes that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._random = folder, np.random.default_rng(SEED)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
        words = (self._random.choice(syllables, n) for n in self._random.integers(1, 5, 20_000))
        self._words = np.array(["".join(parts) for parts in words])
        weights = 1 / (10 + np.arange(len(self._words)))
        self._shares = (weights / weights.sum()).cumsum()
        tokenizer = bpe.train((self.text(300) for _ in range(1000)), VOCABULARY)
        tokenizer.save_pretrained(folder / "tokenizer")

    def text(self, words: int) -> str:
        return " " + " ".join(self._words[self._shares.searchsorted(self._random.random(words))])

    def about(self, mean: int) -> str:
        """A text of `mean` words on average, with a gamma distribution."""
        return self.text(1 + int(self._random.gamma(3, mean / 3)))

    def write(self, name: str, rows: Iterator[Values], **sections: Values) -> Path:
        """Write a data file and a config for a model with two heads and a single layer."""
        with (self.folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        llama = {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": MOST_POSITIONS,
        }
        values: Values = {
            "model": {
                "init": "random",
                "dtype": "float32",
                "tokenizer": str(self.folder / "tokenizer"),
                "config": llama,
            },
            "data": {
                "train": str(self.folder / f"{name}.jsonl"),
                "cache": str(self.folder / "cache"),
            },
            "loss": {"name": "dpo"},
            "optim": {"lr": 1e-4},
            "training": {
                "output_dir": str(self.folder / name),
                "device": "cpu",
                "batch_invariant": False,  # faster for a small model
            },
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def watch(self, *command: str) -> Watched:
        """Run a command to its end; raises RuntimeError with its output if it fails."""
        memory: list[int] = []
        files: list[int] = []
        started = time.monotonic()
        log = self.folder / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            root = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    tree = [root, *root.children(recursive=True)]
                    memory.append(sum(member.memory_info().rss for member in tree))
                    files.append(sum(member.num_fds() for member in tree))
                except psutil.Error:  # a process of the tree has ended
                    continue
                time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {log.read_text()[-2000:]}")
        return Watched(time.monotonic() - started, log.read_text(), memory, files)

    def plan(self, config: Path) -> Values:
        """Tokenize and plan in a process of its own; return its seconds, memory and counts."""
        watched = self.watch(
            sys.executable, "-W", "ignore", "-m", "benchmarks.load", "--plan", str(config)
        )
        counts: Values = json.loads(watched.output.splitlines()[-1])
        return {"seconds": round(watched.seconds, 1), "peak_mib": watched.peak_mib, **counts}

    def train(self, config: Path) -> tuple[Watched, list[Values]]:
        """Train, from the start of the process to the export, and return the metrics too."""
        watched = self.watch(*FASTPREF, "train", str(config))
        return watched, metrics.read_records(config.with_suffix("") / "metrics.jsonl")


def tokenize_and_plan(path: Path) -> Values:
    """Load the data as a run does before its first step, and plan all steps of an epoch."""
    config = configs.load(path)
    started = time.monotonic()
    assert isinstance(config.data.train, str)
    groups = load_groups(
        config.data.train,
        tokenizer_of(config.model, config.data, config.build_loss().kind),
        config.data,
        config.build_loss().kind,
    )
    tokenized = time.monotonic()
    t = config.training
    plan = Plan.of(groups, t.batch_size, MICRO_BATCH_TOKENS, t.seed, "prefix_shared")
    parts = sum(len(step) for step in plan.epoch())
    return {
        "tokenising_seconds": round(tokenized - started, 1),
        "planning_seconds": round(time.monotonic() - tokenized, 1),
        "groups": len(groups),
        "responses": int(groups.offsets[-1]),
        "tokens": int(tokens_of(groups, "prefix_shared").sum()),
        "steps": plan.steps_per_epoch,
        "micro_batches": parts,
    }


def rows(work: Work, scale: float) -> Values:
    def pairs(count: int) -> Iterator[Values]:
        for _ in range(count):
            yield {
                "prompt": work.about(60),
                "chosen": work.about(40),
                "rejected": work.about(40),
            }

    few, many = (
        work.plan(work.write(f"rows-{n}", pairs(n)))
        for n in (int(20_000 * scale), int(200_000 * scale))
    )
    growth = many["peak_mib"] - few["peak_mib"]
    within = many["seconds"] <= 120 and many["peak_mib"] <= 2048 and growth <= 256
    return {"few": few, "many": many, "grown_mib": growth, "within_limits": within}


def long(work: Work, _: float) -> Values:
    pairs = (
        {"prompt": work.text(500), "chosen": work.text(40_000), "rejected": work.text(40_000)}
        for _ in range(3)
    )
    config = work.write(
        "long",
        pairs,
        data={"max_length": 33_500},
        training={"steps": 3, "batch_size": 1, "micro_batch_tokens": 2 * 33_500},
    )
    planned = work.plan(config)
    watched, lines = work.train(config)
    return {
        **planned,
        "training_seconds": round(watched.seconds, 1),
        "training_peak_mib": watched.peak_mib,
        "tokens_per_second": round(lines[-1]["tokens_per_second"]),
        "within_limits": watched.peak_mib <= 4096,
    }


def groups(work: Work, scale: float) -> Values:
    wide = (
        {
            "prompt": work.about(60),
            "completions": [work.about(40) for _ in range(16)],
            "scores": list(range(16)),
        }
        for _ in range(int(10_000 * scale))
    )
    config = work.write(
        "groups",
        wide,
        loss={"name": "info_nca"},
        training={"steps": 20, "batch_size": 64, "micro_batch_tokens": 65_536},
    )
    planned = work.plan(config)
    watched, _lines = work.train(config)
    return {
        **planned,
        "training_seconds": round(watched.seconds, 1),  # the reference of all groups, and 20 steps
        "training_peak_mib": watched.peak_mib,
        "within_limits": planned["seconds"] <= 120 and watched.peak_mib <= 2048,
    }


def steps(work: Work, scale: float) -> Values:
    count = int(50_000 * scale)
    pairs = (
        {"prompt": work.text(8), "chosen": work.text(8), "rejected": work.text(8)}
        for _ in range(1000)
    )
    config = work.write(
        "steps",
        pairs,
        data={"max_length": 16},  # every step has the same number of tokens
        training={
            "steps": count,
            "batch_size": 1,
            "log_every": 1,
            "checkpoint_every": max(1, count // 50),
            "activation_checkpointing": "off",
        },
    )
    watched, lines = work.train(config)
    milliseconds = [1000 * lines[0]["num_tokens"] / line["tokens_per_second"] for line in lines]
    before, after = (
        {
            "step_ms": round(statistics.median(tenth(milliseconds, k)), 3),
            "memory_mib": round(max(tenth(watched.memory, k)) / MIB),
            "open_files": statistics.median(tenth(watched.files, k)),
        }
        for k in (1, 9)
    )
    report = work.watch(*FASTPREF, "report", str(config.with_suffix("")))
    within = (
        after["step_ms"] <= 1.1 * before["step_ms"]
        and after["memory_mib"] <= before["memory_mib"] + 16
        and after["open_files"] <= before["open_files"]
        and report.seconds <= 30
    )
    return {
        "steps": count,
        "seconds": round(watched.seconds),
        "second_tenth": before,
        "last_tenth": after,
        "report_seconds": round(report.seconds, 1),
        "report_peak_mib": report.peak_mib,
        "metrics_mib": round((config.with_suffix("") / "metrics.jsonl").stat().st_size / MIB, 1),
        "within_limits": within,
    }


def tenth(values: list[Any], number: int) -> list[Any]:
    size = len(values) // 10
    return values[number * size : (number + 1) * size]


PARTS = {"rows": rows, "long": long, "groups": groups, "steps": steps}

if __name__ == "__main__":
    main()
