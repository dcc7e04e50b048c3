"""Kill trainings at random places, resume them to the end, compare with an uninterrupted one.

    python -m benchmarks.faults.kills --kills 1000
    python -m benchmarks.faults.kills --kills 100 --ranks 2
    python -m benchmarks.faults.kills --kills 20 --ranks 2 --how SIGKILL --place checkpoint

A training has several lives, each a process. A life is ended by SIGKILL, SIGTERM or Ctrl-C twice:
at a random place of `lives.PLACES` or, one time in five, at a random moment from outside; with
several ranks, one random rank is ended. The next life resumes with `resume=auto`. At the end the
rows of every step, all lines of metrics, the exported weights and the last checkpoint must equal
those of an uninterrupted training. A life is a fork of this process, which has imported everything,
so it costs its own work only. `--out` writes the result, or the part of it for these options; the
exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.end_to_end.presets import word_tokenizer
from benchmarks.faults.lives import HOW, PLACES, End, live, send
from fastpref import metrics
from fastpref.training import checkpoint_files
from fastpref.utils import environment, result_json

STEPS, PAIRS, WORDS = 8, 16, 64
PATIENCE = 300.0  # seconds after which a life counts as hanging
GRACE = 10.0  # seconds in which a connected rank notices that its partner has ended
OUTSIDE = "any moment, from outside"
ENDED = (
    -signal.SIGKILL,
    -signal.SIGTERM,
    -signal.SIGINT,
    128 + signal.SIGTERM,
    128 + signal.SIGINT,
)
LOST_ANOTHER = 2  # exit code of a rank that lost another one
HANGS = 1000  # code for a rank that hung and was killed
Sleep = float  # seconds after which a life ends from outside


@dataclass
class Result:
    """Counts over all trainings; the fields are keys of the result file."""

    trainings: int = 0
    ended_by: Counter[str] = field(default_factory=Counter)
    ended_at: Counter[str] = field(default_factory=Counter)
    steps_made_again: int = 0  # steps after the newest complete checkpoint: the cost of a kill
    steps_lost: int = 0  # steps before it
    rows_replayed: int = 0
    rows_skipped: int = 0
    differing_lines: int = 0
    differing_bits: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.ended_by.total()

    def wrong(self, exact: bool) -> bool:
        """Whether anything is wrong; exact: differing bits count."""
        bits = self.differing_lines + self.differing_bits if exact else 0
        return self.steps_lost + self.rows_replayed + self.rows_skipped + bits > 0 or bool(
            self.failures
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--how", choices=HOW, action="append", help="default: all of them")
    parser.add_argument("--place", default="", help="only those that begin so: step, checkpoint, …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder for all runs; not deleted"
    )
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    ends = Ends(random.Random(options.seed), tuple(options.how or HOW), options.place)
    result = kill_trainings(folder, options.kills, options.ranks, ends)
    seconds = round(time.monotonic() - began)
    if options.out is not None:
        only = [*(options.how or ()), *([options.place] if options.place else ())]
        write(options.out, ", ".join([f"ranks {options.ranks}", *only]), result, seconds)
    if options.folder is None:
        shutil.rmtree(folder)
    print(
        f"{result.kills} kills of {result.trainings} trainings, ranks {options.ranks}, "
        f"{seconds} s: {result.steps_lost} steps lost, {result.rows_replayed} rows replayed, "
        f"{result.rows_skipped} rows skipped, {result.differing_lines} lines and "
        f"{result.differing_bits} bits differ, {len(result.failures)} failures"
    )
    print(*result.failures, sep="\n")
    sys.exit(result.wrong(exact=options.ranks == 1))


@dataclass(frozen=True)
class Ends:
    """Random ends of lives: one in five from outside, unless `place` restricts them."""

    rng: random.Random
    how: tuple[str, ...]
    place: str  # prefix of the names of places

    def draw(self, lasts: float) -> tuple[str, End | Sleep]:
        """Draw an end; lasts: seconds of an uninterrupted life."""
        how = self.rng.choice(self.how)
        if not self.place and self.rng.random() < 0.2:
            return how, self.rng.uniform(0, lasts)
        place = self.rng.choice([name for name in PLACES if name.startswith(self.place)])
        # Entering and leaving count. Steps come often, the places before and after them once.
        return how, End(how, place, self.rng.randint(1, 12 if place.startswith("step") else 4))


def write(path: Path, name: str, result: Result, seconds: int) -> None:
    report = json.loads(path.read_text()) if path.exists() else {"benchmark": "faults"}
    part = {
        **environment.describe("cpu"),
        "seconds": seconds,
        "kills": result.kills,
        **vars(result),
    }
    for counts in ("ended_by", "ended_at"):
        part[counts] = dict(sorted(part[counts].items()))
    report[name] = part
    path.write_text(result_json.dumps(report))


def kill_trainings(folder: Path, kills: int, ranks: int, ends: Ends) -> Result:
    """Run trainings to their end until `kills` lives have been ended."""
    config = write_config(folder)
    result, lasts = Result(), 0.0
    for name in ("cold", "whole"):
        uninterrupted, began = Training(config, folder / name, ranks), time.monotonic()
        uninterrupted.live(None, 0, result)
        lasts = time.monotonic() - began
        assert uninterrupted.done, result.failures
        if name == "cold":
            warm_up(uninterrupted.folder)
    while result.kills < kills and not result.failures:
        training = Training(config, folder / f"training-{result.trainings}", ranks)
        while not training.done and not result.failures:
            end = ends.draw(lasts) if result.kills < kills else None
            training.live(end, ends.rng.randrange(ranks), result)
        result.trainings += 1
        if training.done:
            compare(training, uninterrupted, result)
        if not result.wrong(exact=ranks == 1):
            shutil.rmtree(training.folder)
        print(f"{result.kills} kills of {result.trainings} trainings", flush=True)
    gc.unfreeze()
    return result


def warm_up(folder: Path) -> None:
    """Do once what every life would repeat: imports, transformers' tables of models."""
    for name in (folder / "life-1-0.modules").read_text().split():
        with suppress(Exception):  # some cannot be imported by themselves
            importlib.import_module(name)
    AutoModelForCausalLM.from_pretrained(folder / "run" / "model").save_pretrained(folder / "copy")
    gc.collect()
    gc.freeze()


class Training:
    """A run directory with its own cache, and the rows that its lives have trained on so far."""

    def __init__(self, config: Path, folder: Path, ranks: int) -> None:
        self.folder, self.run, self.ranks = folder, folder / "run", ranks
        self.command = [
            str(config),
            f"training.output_dir={self.run}",
            f"data.cache={folder / 'cache'}",
        ]
        self.rows: list[list[int]] = []  # rows of each step that led to the newest weights
        self.done = False
        self._lives = 0
        folder.mkdir(parents=True)

    def live(self, end: tuple[str, End | Sleep] | None, victim: int, result: Result) -> None:
        """Run one life, and count what it reveals about earlier ones."""
        self._lives += 1
        begins_at = self._newest()
        codes = self._run(end, victim)
        self.done = codes == [0] * self.ranks
        if end is not None and not self.done:
            how, where = end
            result.ended_by[how] += 1
            result.ended_at[where.place if isinstance(where, End) else OUTSIDE] += 1
        for rank, code in enumerate(codes):
            lost = code == LOST_ANOTHER and self.ranks > 1 and rank != victim
            if not (lost or code == 0 or (end is not None and code in ENDED)):
                result.failures.append(f"{self._record(rank)}: exit code {code}, {end}")
        steps = self._steps()
        if steps:
            first = min(steps)
            result.steps_lost += max(0, begins_at + 1 - first)
            result.steps_made_again += max(0, len(self.rows) - begins_at)
            if (
                sorted(steps) != list(range(first, first + len(steps)))
                or first > len(self.rows) + 1
            ):
                result.failures.append(f"{self._record(0)}: steps {sorted(steps)}")
            self.rows[first - 1 :] = [steps[step] for step in sorted(steps)]

    def _run(self, end: tuple[str, End | Sleep] | None, victim: int) -> list[int]:
        """Run the ranks, and return their exit codes; a negative code is a signal."""
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(self.ranks), "HF_HUB_OFFLINE": "1"}
        pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                environ = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                place = end[1] if end is not None and rank == victim else None
                command = [*self.command, "resume=auto"]
                live(
                    command, self._record(rank), environ, place if isinstance(place, End) else None
                )
            pids.append(pid)
        if end is not None and not isinstance(end[1], End):
            time.sleep(end[1])
            send(end[0], pids[victim])
        return wait(pids)

    def _record(self, rank: int) -> Path:
        return self.folder / f"life-{self._lives}-{rank}.jsonl"

    def _steps(self) -> dict[int, list[int]]:
        """Rows of each step that the last life completed, over all ranks."""
        rows: dict[int, list[int]] = {}
        for rank in range(self.ranks):
            for line in metrics.read_records(self._record(rank)):
                rows[line["step"]] = sorted(rows.get(line["step"], []) + line["rows"])
        return rows

    def _newest(self) -> int:
        return max(checkpoint_files.complete_steps(self.run / "checkpoints"), default=0)


def wait(pids: list[int]) -> list[int]:
    """Wait for all processes and return their exit codes; late ones are killed and get `HANGS`.

    A rank whose partner ended before they were connected waits for it. It is ended, as by torchrun.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            late = time.monotonic() > deadline
            if late:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                hung = LOST_ANOTHER if {*codes.values()} & {*ENDED} else HANGS
                codes[pid] = hung if late else os.waitstatus_to_exitcode(status)
                if codes[pid] in ENDED:
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def compare(training: Training, uninterrupted: Training, result: Result) -> None:
    """Compare rows, metrics, export and last checkpoint with those of an uninterrupted training."""
    nothing: list[int] = []
    for rows, expected in zip_longest(training.rows, uninterrupted.rows, fillvalue=nothing):
        result.rows_replayed += (Counter(rows) - Counter(expected)).total()
        result.rows_skipped += (Counter(expected) - Counter(rows)).total()
    lines = zip_longest(untimed(training.run), untimed(uninterrupted.run))
    result.differing_lines += sum(line != expected for line, expected in lines)
    last = f"checkpoints/step-{STEPS}"
    for pattern in ("model/*.safetensors", f"{last}/*.safetensors"):
        for path in uninterrupted.run.glob(pattern):
            ours = training.run / path.relative_to(uninterrupted.run)
            result.differing_bits += differing_bits(ours, path)
    states = [(run.run / last / "state.json").read_text() for run in (training, uninterrupted)]
    result.differing_lines += states[0] != states[1]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in metrics.TIMING_METRICS}
        for line in metrics.read_records(run / "metrics.jsonl")
    ]


def differing_bits(path: Path, expected: Path) -> int:
    """Number of bits of the tensors that differ; headers may differ in order."""
    ours, theirs = load_file(path), load_file(expected)
    assert ours.keys() == theirs.keys(), path
    apart = [
        ours[name].view(-1).view(torch.uint8) ^ theirs[name].view(-1).view(torch.uint8)
        for name in theirs
    ]
    return int(np.unpackbits(torch.cat(apart).numpy()).sum())


def write_config(folder: Path) -> Path:
    """Write a config: a Llama of a few hundred weights, two epochs on pairs of words.

    A step has two micro-batches, and every second step writes a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer"
    word_tokenizer(WORDS).save_pretrained(tokenizer)
    generator = random.Random(0)

    def words() -> str:
        return " ".join(
            f" w{generator.randrange(WORDS - 3)}" for _ in range(generator.randint(1, 6))
        )

    pairs = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(PAIRS)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    llama = {"model_type": "llama", "vocab_size": WORDS, "hidden_size": 16}
    llama |= {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {
        "model": {"init": "random", "dtype": "float32", "config": llama},
        "data": {"train": str(data), "max_length": 64},
        "loss": "dpo",
        "optim": {"lr": 1e-2},
        "training": {
            "epochs": 2,
            "batch_size": PAIRS * 2 // STEPS,
            "micro_batch_tokens": 48,
            "activation_checkpointing": "off",
            "log_every": 1,
            "checkpoint_every": 2,
            "device": "cpu",
        },
    }
    values["model"]["tokenizer"] = str(tokenizer)  # type: ignore[index]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


if __name__ == "__main__":
    main()
