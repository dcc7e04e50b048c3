"""Kill a training run with SIGKILL at random moments, resume it, compare with an unbroken run.

    python benchmarks/kill_resume.py --kills 20

Each trial starts `fastpref train`, kills it after a random step and a random fraction of a second,
resumes with `resume=auto`, and demands the same lines of metrics (but for timing) and the same
exported weights, bit for bit. Prints one line a trial; exit code 1 if any trial differs. `--out`
writes the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fastpref import metrics
from fastpref.bench import environment
from fastpref.data import pure_semantic
from fastpref.files import file_sha256

STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder)
    start(config, folder / "whole").wait()
    expected = outcome(folder / "whole")
    chance, equal, steps = random.Random(options.seed), 0, []
    for trial in range(options.kills):
        run = folder / f"trial-{trial}"
        step = kill_at_random(config, run, chance)
        start(config, run, "resume=auto").wait()
        same = outcome(run) == expected
        equal += same
        steps.append(step)
        print(f"trial {trial}: killed after step {step}: {'equal' if same else 'DIFFERENT'}")
    print(f"{equal} of {options.kills} resumed runs equal the uninterrupted one")
    if options.out is not None:
        report = {"benchmark": "kill_resume", **environment.describe(), "kills": options.kills}
        report |= {"equal": equal, "killed_after_step": steps, "steps": STEPS}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(equal != options.kills)


def write_config(folder: Path) -> Path:
    """A tiny Llama on pure-semantic pairs, a checkpoint every third step."""
    train, _ = pure_semantic.write(folder / "data")
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:200]))
    llama = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    values = {
        "model": {"init": "random", "dtype": "float32", "config": llama},
        "data": {"train": str(train), "max_length": 64, "cache": str(folder / "cache")},
        "loss": "dpo",
        "optim": {"lr": 1e-3},
        "training": {"steps": STEPS, "batch_size": 8, "log_every": 1, "checkpoint_every": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "fastpref", "train", str(config)]
    return subprocess.Popen(
        [*command, f"training.output={run}", *overrides],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def kill_at_random(config: Path, run: Path, chance: random.Random) -> int:
    """Start a run and SIGKILL it; returns the last step whose metrics were on disk."""
    process, target = start(config, run), chance.randrange(1, STEPS - 1)
    while process.poll() is None and last_step(run) < target:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))  # into a step, a line of metrics, or a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    return last_step(run)


def last_step(run: Path) -> int:
    lines = metrics.read(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def outcome(run: Path) -> dict[str, Any]:
    lines = metrics.read(run / "metrics.jsonl")
    kept = [{k: v for k, v in line.items() if k not in metrics.TIMING_METRICS} for line in lines]
    weights = run / "model" / "model.safetensors"
    return {"metrics": json.dumps(kept), "weights": weights.exists() and file_sha256(weights)}


if __name__ == "__main__":
    main()
