"""End trainings at random places, resume them until they are done, compare with an unbroken one.

    python -m benchmarks.faults.kills --kills 1000
    python -m benchmarks.faults.kills --kills 100 --ranks 2
    python -m benchmarks.faults.kills --kills 20 --ranks 2 --how SIGKILL --place checkpoint

Every life of a training ends by SIGKILL, SIGTERM or Ctrl-C twice: at a random place of
`lives.PLACES` or, one in five, at a random moment from outside; of several ranks one, any of
them. The next life resumes with `resume=auto`. At the end the rows of every step, all lines of
metrics, the exported weights and the last checkpoint must be those of a training that nobody ended.
A training is a fork of this process, which has imported everything: a life costs its own work only.
`--out` writes the result, or the part of it that is of these options; exit code 1 if anything
differs.
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
from fastpref.utils import environment

STEPS, PAIRS, WORDS = 8, 16, 64
PATIENCE = 300.0  # seconds that a life may last; what lasts longer hangs
GRACE = 10.0  # seconds in which a rank notices that its partner has gone, once they have met
OUTSIDE = "any moment, from outside"
ENDED = (
    -signal.SIGKILL,
    -signal.SIGTERM,
    -signal.SIGINT,
    128 + signal.SIGTERM,
    128 + signal.SIGINT,
)
LOST_ANOTHER = 2  # exit code of a rank that has lost another one
HANGS = 1000  # of one that had to be killed in the end
Sleep = float  # seconds after which a life ends from outside


@dataclass
class Found:
    """What all trainings came to."""

    trainings: int = 0
    ended_by: Counter[str] = field(default_factory=Counter)
    ended_at: Counter[str] = field(default_factory=Counter)
    steps_made_again: int = 0  # after the newest complete checkpoint: what an end costs
    steps_lost: int = 0  # before it
    rows_replayed: int = 0
    rows_skipped: int = 0
    differing_lines: int = 0
    differing_bits: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.ended_by.total()

    def wrong(self, exact: bool) -> bool:
        """exact: whether bits count."""
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
    parser.add_argument("--folder", type=Path, default=None, help="kept, with all runs in it")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    ends = Ends(random.Random(options.seed), tuple(options.how or HOW), options.place)
    found = torment(folder, options.kills, options.ranks, ends)
    seconds = round(time.monotonic() - began)
    if options.out is not None:
        only = [*(options.how or ()), *([options.place] if options.place else ())]
        write(options.out, ", ".join([f"ranks {options.ranks}", *only]), found, seconds)
    if options.folder is None:
        shutil.rmtree(folder)
    print(
        f"{found.kills} kills of {found.trainings} trainings, ranks {options.ranks}, {seconds} s: "
        f"{found.steps_lost} steps lost, {found.rows_replayed} rows replayed, {found.rows_skipped} "
        f"rows skipped, {found.differing_lines} lines and {found.differing_bits} bits differ, "
        f"{len(found.failures)} failures"
    )
    print(*found.failures, sep="\n")
    sys.exit(found.wrong(exact=options.ranks == 1))


@dataclass(frozen=True)
class Ends:
    """What lives end by, and where: one in five from outside, unless places are asked for."""

    chance: random.Random
    how: tuple[str, ...]
    place: str  # how their names begin

    def draw(self, lasts: float) -> tuple[str, End | Sleep]:
        """lasts: seconds of a life that nobody ends."""
        how = self.chance.choice(self.how)
        if not self.place and self.chance.random() < 0.2:
            return how, self.chance.uniform(0, lasts)
        place = self.chance.choice([name for name in PLACES if name.startswith(self.place)])
        # Entered and left count; steps come often, what is before and after them once.
        return how, End(how, place, self.chance.randint(1, 12 if place.startswith("step") else 4))


def write(path: Path, name: str, found: Found, seconds: int) -> None:
    report = json.loads(path.read_text()) if path.exists() else {"benchmark": "faults"}
    part = {**environment.describe("cpu"), "seconds": seconds, "kills": found.kills, **vars(found)}
    for counts in ("ended_by", "ended_at"):
        part[counts] = dict(sorted(part[counts].items()))
    report[name] = part
    path.write_text(json.dumps(report, indent=1) + "\n")


def torment(folder: Path, kills: int, ranks: int, ends: Ends) -> Found:
    """Trainings, each to its end, until so many lives have been ended."""
    config = write_config(folder)
    found, lasts = Found(), 0.0
    for name in ("cold", "whole"):
        whole, began = Training(config, folder / name, ranks), time.monotonic()
        whole.live(None, 0, found)
        lasts = time.monotonic() - began
        assert whole.done, found.failures
        if name == "cold":
            warm_up(whole.folder)
    while found.kills < kills and not found.failures:
        training = Training(config, folder / f"training-{found.trainings}", ranks)
        while not training.done and not found.failures:
            end = ends.draw(lasts) if found.kills < kills else None
            training.live(end, ends.chance.randrange(ranks), found)
        found.trainings += 1
        if training.done:
            compare(training, whole, found)
        if not found.wrong(exact=ranks == 1):
            shutil.rmtree(training.folder)
        print(f"{found.kills} kills of {found.trainings} trainings", flush=True)
    gc.unfreeze()
    return found


def warm_up(folder: Path) -> None:
    """Do here once what every life would do again: imports, transformers' tables of models."""
    for name in (folder / "life-1-0.modules").read_text().split():
        with suppress(Exception):  # some cannot be imported by themselves
            importlib.import_module(name)
    AutoModelForCausalLM.from_pretrained(folder / "run" / "model").save_pretrained(folder / "copy")
    gc.collect()
    gc.freeze()


class Training:
    """A run directory with a cache of its own, and what its lives have trained on so far."""

    def __init__(self, config: Path, folder: Path, ranks: int) -> None:
        self.folder, self.run, self.ranks = folder, folder / "run", ranks
        self.command = [
            str(config),
            f"training.output_dir={self.run}",
            f"data.cache={folder / 'cache'}",
        ]
        self.rows: list[list[int]] = []  # of the steps that the newest weights have taken
        self.done = False
        self._lives = 0
        folder.mkdir(parents=True)

    def live(self, end: tuple[str, End | Sleep] | None, victim: int, found: Found) -> None:
        """One life, and what it says about the ones before."""
        self._lives += 1
        begins_at = self._newest()
        codes = self._run(end, victim)
        self.done = codes == [0] * self.ranks
        if end is not None and not self.done:
            how, where = end
            found.ended_by[how] += 1
            found.ended_at[where.place if isinstance(where, End) else OUTSIDE] += 1
        for rank, code in enumerate(codes):
            lost = code == LOST_ANOTHER and self.ranks > 1 and rank != victim
            if not (lost or code == 0 or (end is not None and code in ENDED)):
                found.failures.append(f"{self._record(rank)}: exit code {code}, {end}")
        steps = self._steps()
        if steps:
            first = min(steps)
            found.steps_lost += max(0, begins_at + 1 - first)
            found.steps_made_again += max(0, len(self.rows) - begins_at)
            if (
                sorted(steps) != list(range(first, first + len(steps)))
                or first > len(self.rows) + 1
            ):
                found.failures.append(f"{self._record(0)}: steps {sorted(steps)}")
            self.rows[first - 1 :] = [steps[step] for step in sorted(steps)]

    def _run(self, end: tuple[str, End | Sleep] | None, victim: int) -> list[int]:
        """Exit codes of the ranks; minus the signal that ended one."""
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(self.ranks), "HF_HUB_OFFLINE": "1"}
        pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                place = end[1] if end is not None and rank == victim else None
                command = [*self.command, "resume=auto"]
                live(command, self._record(rank), own, place if isinstance(place, End) else None)
            pids.append(pid)
        if end is not None and not isinstance(end[1], End):
            time.sleep(end[1])
            send(end[0], pids[victim])
        return wait(pids)

    def _record(self, rank: int) -> Path:
        return self.folder / f"life-{self._lives}-{rank}.jsonl"

    def _steps(self) -> dict[int, list[int]]:
        """Rows of each step that the last life has completed, of all ranks."""
        found: dict[int, list[int]] = {}
        for rank in range(self.ranks):
            for line in metrics.read(self._record(rank)):
                found[line["step"]] = sorted(found.get(line["step"], []) + line["rows"])
        return found

    def _newest(self) -> int:
        return max(checkpoint_files.complete(self.run / "checkpoints"), default=0)


def wait(pids: list[int]) -> list[int]:
    """Until all have ended; those that do not in time are killed, with a code of their own.

    A rank whose partner has gone before they met waits for it. As torchrun does, it is ended.
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


def compare(training: Training, whole: Training, found: Found) -> None:
    """Rows, metrics, export and last checkpoint of a training beside the one that nobody ended."""
    nothing: list[int] = []
    for rows, expected in zip_longest(training.rows, whole.rows, fillvalue=nothing):
        found.rows_replayed += (Counter(rows) - Counter(expected)).total()
        found.rows_skipped += (Counter(expected) - Counter(rows)).total()
    lines = zip_longest(untimed(training.run), untimed(whole.run))
    found.differing_lines += sum(line != expected for line, expected in lines)
    last = f"checkpoints/step-{STEPS}"
    for pattern in ("model/*.safetensors", f"{last}/*.safetensors"):
        for path in whole.run.glob(pattern):
            ours = training.run / path.relative_to(whole.run)
            found.differing_bits += differing_bits(ours, path)
    states = [(each.run / last / "state.json").read_text() for each in (training, whole)]
    found.differing_lines += states[0] != states[1]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in metrics.TIMING_METRICS}
        for line in metrics.read(run / "metrics.jsonl")
    ]


def differing_bits(path: Path, expected: Path) -> int:
    """Bits of the tensors that differ; headers hold the same in any order."""
    ours, theirs = load_file(path), load_file(expected)
    assert ours.keys() == theirs.keys(), path
    apart = [
        ours[name].view(-1).view(torch.uint8) ^ theirs[name].view(-1).view(torch.uint8)
        for name in theirs
    ]
    return int(np.unpackbits(torch.cat(apart).numpy()).sum())


def write_config(folder: Path) -> Path:
    """A Llama of a few hundred weights on pairs of words: two micro-batches a step, a checkpoint
    every second one, two epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer"
    word_tokenizer(WORDS).save_pretrained(tokenizer)
    chance = random.Random(0)

    def words() -> str:
        return " ".join(f" w{chance.randrange(WORDS - 3)}" for _ in range(chance.randint(1, 6)))

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
