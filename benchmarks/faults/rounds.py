"""Kill runs of `fastpref rounds` at random places, resume them, compare with an uninterrupted one.

    python -m benchmarks.faults.rounds --kills 50

A life is a forked process, which SIGKILL or SIGTERM ends when a function is entered or left for the
n-th time, or at a random moment. At the end all files of the rounds, the lines of metrics, the
exported weights and the last checkpoint must equal those of the uninterrupted run, bit by bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from rich.console import Console

from benchmarks.faults import lives
from benchmarks.faults.kills import differing_bits, untimed, write_config
from fastpref import config as configs
from fastpref.model import policy
from fastpref.online import value_steps
from fastpref.rounds import (
    artifacts,
    loop,
    measures,
    pair_learner,
    rollout_learner,
    scoring,
    sequence,
    session,
)
from fastpref.training import signals
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display

PLACES: dict[str, tuple[Any, str]] = {
    "session: loaded": (session, "load_policy"),
    "samples: generated": (policy, "with_transformers"),
    "samples: shard": (artifacts.Shards, "append"),
    "round: file": (artifacts.RoundFiles, "write"),
    "round: tensors": (artifacts.RoundFiles, "write_tensors"),
    "rollouts: computed": (rollout_learner.RolloutLearner, "_collect"),
    "values: stepped": (value_steps.ValueSteps, "after_step"),
    "scores: computed": (scoring, "_scores"),
    "pairs: made": (sequence, "pair"),
    "pairs: tokens": (pair_learner, "groups_of"),
    "round: measured": (measures, "policy_metrics"),
    **{
        name: place for name, place in lives.PLACES.items() if not name.startswith(("model", "tok"))
    },
}
# Objectives on rollouts: one with a value head, one without, one with opponents.
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ppo": {"name": "ppo", "value_lr": 0.05},
    "grpo": {"name": "grpo"},
    "nash_md": {"name": "nash_md", "mixture": 0.5},
}
KILLED = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)


class DifferentWords:
    """Scorer of the tests: the number of different words."""

    fingerprint = "different words"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter", action="store_true", help="LoRA with an averaged reference")
    parser.add_argument("--loss", choices=OPTIONS, default="dpo")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-rounds-"))
    lives.PLACES.update(PLACES)
    began = time.monotonic()
    values = rounds_config(folder, options.adapter, options.loss)
    report = kill_runs(folder, options.kills, random.Random(options.seed), values)
    report["seconds"] = round(time.monotonic() - began)
    shutil.rmtree(folder)
    print(json.dumps(report, indent=1))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        rounds = values["rounds"]
        reference = str(rounds.get("reference", "round")).replace("'", "")
        name = f"{'lora' if options.adapter else 'all weights'}, reference: {reference}"
        name = name if options.loss == "dpo" else f"{options.loss}, {name}"
        known[name] = {**environment.describe("cpu"), **report}
        options.out.write_text(result_json.dumps({"benchmark": "faults-rounds", **known}))
    sys.exit(bool(report["differences"]))


def kill_runs(
    folder: Path, kills: int, rng: random.Random, values: dict[str, Any]
) -> dict[str, Any]:
    """Kill lives of runs until there are enough, and compare each run with the whole one."""
    whole = folder / "whole"
    began = time.monotonic()
    code = _wait(_live(values, whole, None))
    assert code == 0, (whole.parent / "whole.txt").read_text()
    lasts = time.monotonic() - began
    gc.freeze()
    ended_at: Counter[str] = Counter()
    differences: list[str] = []
    runs = 0
    while ended_at.total() < kills and not differences:
        run = folder / f"run-{runs}"
        runs += 1
        code = 1
        while code != 0:
            place = _place(rng) if ended_at.total() < kills else None
            pid = _live(values, run, place)
            if place is not None and place.count == 0:
                time.sleep(rng.uniform(0, lasts))
                lives.send(place.how, pid)
            code = _wait(pid)
            if code != 0:
                if code not in KILLED:
                    text = run.with_suffix(".txt").read_text()[-2000:]
                    return {"kills": ended_at.total(), "differences": [f"{code}: {text}"]}
                assert place is not None
                ended_at[place.place] += 1
        differences += compare(run, whole)
        shutil.rmtree(run)
    return {
        "kills": ended_at.total(),
        "runs": runs,
        "ended_at": dict(sorted(ended_at.items())),
        "differences": differences,
    }


def _place(rng: random.Random) -> lives.End:
    how = rng.choice(("SIGKILL", "SIGKILL", "SIGTERM"))
    if rng.random() < 0.2:
        return lives.End(how, "any moment, from outside", 0)
    return lives.End(how, rng.choice(list(PLACES)), rng.randint(1, 12))


def _live(values: dict[str, Any], run: Path, end: lives.End | None) -> int:
    pid = os.fork()
    if pid == 0:
        _child(values, run, end)
    return pid


def _child(values: dict[str, Any], run: Path, end: lives.End | None) -> NoReturn:
    output = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if end is not None and end.count:
        lives.end_at(end)
    training = {**values["training"], "output_dir": str(run)}
    data = {**values["data"], "cache": f"{run}-cache"}
    config = configs.parse({**values, "training": training, "data": data, "resume": "auto"})
    code = 0
    try:
        with Display(Console(width=150)) as display:
            loop.run(config, display, scorer=DifferentWords)
    except signals.Interrupted as stop:
        code = 128 + stop.signum
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def compare(run: Path, whole: Path) -> list[str]:
    """Differences of a run from the whole one, a line each."""
    lines = []
    ours, theirs = (
        {path.relative_to(root / "rounds"): path for path in (root / "rounds").rglob("*.*")}
        for root in (run, whole)
    )
    lines += [f"only one run has {path}" for path in ours.keys() ^ theirs.keys()]
    lines += [
        f"{path} differs"
        for path in ours.keys() & theirs.keys()
        if ours[path].read_bytes() != theirs[path].read_bytes()
    ]
    if (run / "rounds.jsonl").read_bytes() != (whole / "rounds.jsonl").read_bytes():
        lines.append("rounds.jsonl differs")
    if untimed(run) != untimed(whole):
        lines.append("metrics.jsonl differs")
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for pattern in ("model/*.safetensors", f"checkpoints/{last.name}/*.safetensors"):
        for path in whole.glob(pattern):
            bits = differing_bits(run / path.relative_to(whole), path)
            lines += [f"{path.name}: {bits} bits differ"] if bits else []
    return lines


def rounds_config(folder: Path, adapter: bool, loss: str = "dpo") -> dict[str, Any]:
    """Three rounds of two steps on a Llama of a few hundred weights."""
    values: dict[str, Any] = yaml.safe_load(write_config(folder).read_text())
    pairs = values["data"]["train"]
    values["data"] = {"train": pairs, "eval": pairs, "max_length": 64}
    values["training"] = {
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 1,
        "activation_checkpointing": "off",
        "device": "cpu",
    }
    values["rounds"] = {
        "count": 3,
        "prompts": 8,
        "sampling": {"samples": 3, "max_new_tokens": 6, "batch_size": 6},
        "scorer": {"function": "builtins:len"},
        "eval_prompts": 4,
    }
    if adapter:
        values["adapter"] = {"r": 2, "alpha": 4, "dropout": 0.1}
        values["rounds"]["reference"] = {"ema": 0.9}
    if loss != "dpo":
        values["loss"] = OPTIONS[loss]
        if loss == "ppo" or not adapter:
            values["rounds"]["reference"] = "start"
    return values


if __name__ == "__main__":
    main()
