"""Kill ranks of trainings that torchrun's agent restarts, and compare them with undisturbed ones.

    python -m benchmarks.faults.restarts --kills 20
    python -m benchmarks.faults.restarts --kills 20 --backend c10d

A training has two ranks under the agent of torchrun with `--max-restarts`, here in this process, so
that ranks are forks which have imported everything. In each life but the last one random rank gets
SIGKILL, at a random place of `lives.PLACES` or a random moment. After each kill the agent starts
both ranks again, and they have to meet and to resume. At the end the rows of every step and all
lines of metrics must equal those of an undisturbed training; the exit code is 1 if they do not.
`--out` writes the result, or the part of it for this backend.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.faults import kills
from benchmarks.faults.kills import STEPS, Ends, free_port, untimed, write_config
from benchmarks.faults.lives import End, end_at, record_rows, send
from fastpref import cli, metrics
from fastpref.utils import environment, result_json

RANKS, LIVES = 2, 6  # of a training, the last without a kill
Plan = list[tuple[int, End | float]]  # the rank that is killed in each life, and where or when


@dataclass
class Result:
    """Counts over all trainings; the fields are keys of the result file."""

    trainings: int = 0
    kills: int = 0
    restarts: int = 0
    killed_at: Counter[str] = field(default_factory=Counter)
    resumed_after: Counter[str] = field(default_factory=Counter)  # steps that were not made again
    differing_lines: int = 0
    differing_rows: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.differing_lines + self.differing_rows > 0 or bool(self.failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--backend", choices=["static", "c10d"], default="static")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="for all runs; not deleted")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="restarts-"))
    began = time.monotonic()
    result = restart_trainings(folder, options.kills, options.backend, random.Random(options.seed))
    seconds = round(time.monotonic() - began)
    if options.out is not None:
        _write(options.out, f"torchrun, {options.backend}", result, seconds)
    if options.folder is None:
        shutil.rmtree(folder)
    print(
        f"{result.kills} kills and {result.restarts} restarts of {result.trainings} trainings, "
        f"{seconds} s: {result.differing_lines} lines and {result.differing_rows} rows differ, "
        f"{len(result.failures)} failures"
    )
    print(*result.failures, sep="\n")
    sys.exit(result.wrong)


def restart_trainings(folder: Path, count: int, backend: str, rng: random.Random) -> Result:
    """Run trainings to their end until `count` ranks have been killed."""
    config, result = write_config(folder), Result()
    ends = Ends(rng, ("SIGKILL",), "")
    for name in ("cold", "undisturbed"):
        undisturbed, began = folder / name, time.monotonic()
        if not launch(config, undisturbed, [], backend):
            raise RuntimeError(f"the undisturbed training in {undisturbed} failed")
        lasts = time.monotonic() - began
        if name == "cold":
            kills.warm_up(undisturbed)
    while result.kills < count and not result.failures:
        training = folder / f"training-{result.trainings}"
        lives = min(LIVES - 1, count - result.kills)
        plan: Plan = [(rng.randrange(RANKS), ends.draw(lasts)[1]) for _ in range(lives)]
        ended = launch(config, training, plan, backend)
        result.trainings += 1
        count_kills(training, result)
        if not ended:
            result.failures.append(f"{training}: did not end")
            continue
        expected = untimed(undisturbed / "run")
        result.differing_lines += sum(
            ours != theirs for ours, theirs in zip_longest(untimed(training / "run"), expected)
        )
        rows, expected_rows = rows_of(training), rows_of(undisturbed)
        result.differing_rows += sum(rows.get(k) != expected_rows[k] for k in range(1, STEPS + 1))
        if not result.wrong:
            shutil.rmtree(training)
        print(f"{result.kills} kills of {result.trainings} trainings", flush=True)
    return result


def launch(config: Path, folder: Path, plan: Plan, backend: str) -> bool:
    """Run a training under the agent of torchrun; return whether it came to its end."""
    folder.mkdir(parents=True)
    port = free_port()
    options = {"rank": 0} if backend == "static" else {}
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id=folder.name,
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_backend=backend,
        rdzv_configs=options,
        max_restarts=len(plan),
        monitor_interval=0.05,
        start_method="fork",
    )
    with suppress(ChildFailedError):
        elastic_launch(agent, rank_of)(config, folder, plan)
        return True
    return False


def rank_of(config: Path, folder: Path, plan: Plan) -> None:
    """One life of one rank, in a process of its own; torchrun has set its environment."""
    rank, life = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    record = folder / f"life-{life + 1}-{rank}.jsonl"
    output = os.open(record.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    record_rows(record)
    timer = None
    if life < len(plan) and plan[life][0] == int(rank):
        timer = _end(plan[life][1], folder)
    run, cache = folder / "run", folder / "cache"
    sys.argv = ["fastpref", "train", str(config), f"training.output_dir={run}", "resume=auto"]
    sys.argv.append(f"data.cache={cache}")
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
    # The queue for the result of a fork, which torchrun does not have, would stay locked.
    if timer is not None:
        timer.cancel()
    sys.stdout.flush()
    record.with_suffix(".modules").write_text("\n".join(sys.modules))


def _end(end: End | float, folder: Path) -> threading.Timer | None:
    """Let this process be killed, and keep where; return the timer of a random moment."""
    kill_file = folder / "killed.txt"

    def note(place: str) -> None:
        with kill_file.open("a") as file:
            file.write(f"{place}\n")

    if isinstance(end, End):
        end_at(end, lambda: note(end.place))
        return None

    def kill() -> None:
        note(kills.OUTSIDE)
        send("SIGKILL", os.getpid())

    timer = threading.Timer(end, kill)
    timer.daemon = True
    timer.start()
    return timer


def count_kills(training: Path, result: Result) -> None:
    """Count the kills of a training, and the steps after which its lives went on."""
    path = training / "killed.txt"
    places = path.read_text().splitlines() if path.exists() else []
    result.kills += len(places)
    result.killed_at.update(places)
    begins = [_first_step(life) for life in _lives(training)[1:]]
    result.restarts += len(begins)
    if len(begins) != len(places):
        result.failures.append(f"{training}: {len(places)} kills, {len(begins)} restarts")
    result.resumed_after.update(f"step {step - 1}" for step in begins if step is not None)


def rows_of(training: Path) -> dict[int, list[int]]:
    """Rows of each step over both ranks, in the last life that made it."""
    rows: dict[int, list[int]] = {}
    for records in _lives(training):
        life: dict[int, list[int]] = {}
        for path in records:
            for line in metrics.read_records(path):
                life.setdefault(line["step"], []).extend(line["rows"])
        rows |= {step: sorted(numbers) for step, numbers in life.items()}
    return rows


def _lives(training: Path) -> list[list[Path]]:
    """The records of both ranks in each life."""
    numbers = sorted({int(path.name.split("-")[1]) for path in training.glob("life-*.jsonl")})
    return [sorted(training.glob(f"life-{number}-*.jsonl")) for number in numbers]


def _first_step(records: list[Path]) -> int | None:
    steps = [line["step"] for path in records for line in metrics.read_records(path)]
    return min(steps, default=None)


def _write(path: Path, name: str, result: Result, seconds: int) -> None:
    report: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"benchmark": "faults"}
    )
    part = {**environment.describe("cpu"), "seconds": seconds, **vars(result)}
    for counts in ("killed_at", "resumed_after"):
        part[counts] = dict(sorted(part[counts].items()))
    report[name] = part
    path.write_text(result_json.dumps(report))


if __name__ == "__main__":
    main()
