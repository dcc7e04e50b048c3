"""Streamed data: memory and time of an epoch of many rows, and of going on in its middle.

    python -m benchmarks.large_data [--rows 10000000] [--folder FOLDER] [--out FILE]

Writes pairs of short texts into Parquet files of 100,000 rows, which stay in the folder if it is
named. One process then asks for the groups of every step of an epoch in turn, as training does, and
collates every hundredth batch. Another starts in the middle of the epoch, as a run that is resumed,
and its first batch must be that of the first process. Peaks are of whole processes, Python, torch
and transformers included.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.config import Data
from fastpref.data import bpe
from fastpref.data.collate import Batch, collate
from fastpref.data.stream_plan import StreamedPlan, plan_stream
from fastpref.data.stream_plan import tokens as tokens_of
from fastpref.data.streaming import StreamedGroups
from fastpref.utils import environment, result_json
from fastpref.utils.atomic_files import replacing

RESULTS = Path(__file__).parent / "results" / "large-data.json"
ROWS_OF_FILE, VOCABULARY, BATCH_SIZE, SEED = 100_000, 4000, 32, 0
MOST_MIB = 1024
Values = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="for the data; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=("epoch", "middle"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        measure = epoch if options.part == "epoch" else middle
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="large-data-") as temporary:
        folder = options.folder or Path(temporary)
        write(folder, options.rows)
        whole, resumed = (in_process(folder, part) for part in ("epoch", "middle"))
    same = whole.pop("middle_batch") == resumed.pop("middle_batch")
    report = {
        "benchmark": "large-data",
        **environment.describe("cpu"),
        "command": shlex.join(
            ["python", "-m", "benchmarks.large_data", "--rows", f"{options.rows}"]
        ),
        "rows": options.rows,
        "epoch": whole,
        "resumed_in_the_middle": resumed,
        "same_batch": same,
        "within_limits": same and whole["peak_mib"] <= MOST_MIB,
    }
    print(json.dumps(report, indent=1))
    with replacing(options.out) as path:
        path.write_text(result_json.dumps(report))
    sys.exit(0 if report["within_limits"] else 1)


def write(folder: Path, rows: int) -> None:
    """Write the pairs, unless an earlier call has."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"])
    for start in range(0, rows, ROWS_OF_FILE):
        path = folder / f"part-{start // ROWS_OF_FILE:05}.parquet"
        if path.exists():
            continue
        count = min(ROWS_OF_FILE, rows - start)
        prompts, chosen, rejected = (texts(words, generator, count, mean) for mean in (8, 12, 12))
        numbered = [f"{start + k}: {prompt}?\n" for k, prompt in enumerate(prompts)]
        table = pa.table({"prompt": numbered, "chosen": chosen, "rejected": rejected})
        with replacing(path) as temporary:
            pq.write_table(table, temporary)


def texts(
    words: np.ndarray[Any, Any], generator: np.random.Generator, count: int, mean: int
) -> list[str]:
    sizes = generator.poisson(mean, count) + 1
    drawn = words[generator.integers(0, len(words), int(sizes.sum()))]
    return [" ".join(part) for part in np.split(drawn, sizes.cumsum()[:-1])]


def in_process(folder: Path, part: str) -> Values:
    command = [sys.executable, "-m", __spec__.name, "--folder", str(folder), "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: Values = json.loads(done.stdout)
    return values


def epoch(folder: Path) -> Values:
    """Read the groups of all steps of an epoch."""
    started = time.monotonic()
    groups, plan = opened(folder)
    gc.freeze()
    gc.disable()  # as in training
    first, tokens, digest = 0.0, 0, ""
    for number in range(plan.steps_per_epoch):
        step = [[groups[index] for index in indices] for indices in plan.step(number)]
        tokens += sum(tokens_of(group, "packed") for part in step for group in part)
        if number % 100 == 0 or number == plan.steps_per_epoch // 2:
            (batch,) = (collate(part, "pairwise", "prefix_shared") for part in step)
            digest = digest_of(batch) if number == plan.steps_per_epoch // 2 else digest
        first = first or time.monotonic() - started
    seconds = time.monotonic() - started
    return {
        "first_batch_seconds": round(first, 1),
        "seconds": round(seconds),
        "rows_per_second": round(len(groups) / seconds),
        "steps": plan.steps_per_epoch,
        "tokens": tokens,
        "peak_mib": peak_mib(),
        "data_mib": round(sum(f.stat().st_size for f in folder.iterdir()) / 2**20),
        "middle_batch": digest,
    }


def middle(folder: Path) -> Values:
    """Collate the batch in the middle of an epoch, and nothing before it."""
    started = time.monotonic()
    groups, plan = opened(folder)
    (indices,) = plan.step(plan.steps_per_epoch // 2)
    batch = collate([groups[index] for index in indices], "pairwise", "prefix_shared")
    seconds = round(time.monotonic() - started, 1)
    values = {"batch_seconds": seconds, "peak_mib": peak_mib(), "middle_batch": digest_of(batch)}
    print(json.dumps(values), flush=True)
    os._exit(0)  # a thread tokenizes the next window


def opened(folder: Path) -> tuple[StreamedGroups, StreamedPlan]:
    sample = pq.read_table(min(folder.glob("*.parquet"))).slice(0, 2000).to_pylist()
    tokenizer = bpe.train([text for row in sample for text in row.values()], VOCABULARY)
    data = Data(train=str(folder), streaming=True, max_length=256)
    groups = StreamedGroups(data, tokenizer, "pairwise", BATCH_SIZE, SEED)
    return groups, plan_stream(groups, BATCH_SIZE, 16384, SEED, "prefix_shared")


def digest_of(batch: Batch) -> str:
    return hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest()


def peak_mib() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
