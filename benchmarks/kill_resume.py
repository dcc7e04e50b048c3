"""Kill a training run with SIGKILL at random moments, resume it, compare with an unbroken run.

    python benchmarks/kill_resume.py --kills 20 [--ranks 2] [--during step|checkpoint]

Each trial starts `fastpref train`, kills it after a random step and a random fraction of a second,
or while a checkpoint is being written, resumes with `resume=auto`, and demands the same lines of
metrics (but for timing) and the same exported weights, bit for bit. Of several ranks one is killed,
any of them, and the others have to end by themselves. Prints one line a trial; exit code 1 if any
trial differs. `--out` writes the result file, or the part of it that is of these options.
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
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from fastpref import metrics
from fastpref.bench import environment
from fastpref.data import pure_semantic
from fastpref.files import file_sha256

STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--during", choices=("step", "checkpoint"), default="step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder)
    start = partial(launch, config, options.ranks)
    start(folder / "whole").wait()
    expected = outcome(folder / "whole")
    assert expected["weights"], "the run that nobody killed has no export"
    chance, equal, steps = random.Random(options.seed), 0, []
    for trial in range(options.kills):
        run = folder / f"trial-{trial}"
        step = kill_at_random(start(run), run, options.during, chance)
        start(run, "resume=auto").wait()
        same = outcome(run) == expected
        equal += same
        steps.append(step)
        print(f"trial {trial}: killed after step {step}: {'equal' if same else 'DIFFERENT'}")
    print(f"{equal} of {options.kills} resumed runs equal the uninterrupted one")
    if options.out is not None:
        report = json.loads(options.out.read_text()) if options.out.exists() else {}
        report["benchmark"] = "kill_resume"
        part = {**environment.describe(), "kills": options.kills, "equal": equal, "steps": STEPS}
        part["killed_after_step"] = steps
        report[f"ranks {options.ranks}, in a {options.during}"] = part
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


def launch(config: Path, ranks: int, run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["fastpref", "train", str(config), f"training.output={run}", *overrides]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=None if ranks == 1 else subprocess.DEVNULL,  # torchrun says at length who died
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def kill_at_random(
    process: subprocess.Popen[bytes], run: Path, during: str, chance: random.Random
) -> int:
    """SIGKILL a run, or one of its ranks; returns the last step whose metrics were on disk."""
    target = chance.randrange(1, STEPS - 3)
    while process.poll() is None and last_step(run) < target:
        time.sleep(0.002)
    if during == "step":
        time.sleep(chance.uniform(0, 0.1))
    else:
        while process.poll() is None and not any((run / "checkpoints").glob(".step-*")):
            pass
        time.sleep(chance.uniform(0, 0.01))
    victims = psutil.Process(process.pid).children() or [psutil.Process(process.pid)]
    chance.choice(victims).send_signal(signal.SIGKILL)
    process.wait(timeout=120)
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
