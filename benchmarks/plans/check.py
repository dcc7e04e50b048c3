"""Compare the peak memory that `fastpref plan` predicts with that of training, on CPU or GPU.

    python -m benchmarks.plans.check                              # seven on a CPU, 4 minutes
    python -m benchmarks.plans.check --check lora-8b qlora-8b full-1.5b   # on a GPU

A child process trains each config for two steps. On a CPU the measure is its peak resident memory
beyond that after imports and a tiny run of the same kind, with glibc set to return freed blocks at
once; on CUDA it is the peak of torch's allocator. The exit code is 1 if a prediction is more than
15 % off.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.end_to_end.presets import PRESETS, SHORT, TEXTS, Lengths, Values, word_tokenizer
from benchmarks.end_to_end.trainers import memory_now, memory_peak
from fastpref import config as configs
from fastpref.data.sources import load_data
from fastpref.data.tokenizers import load_tokenizer
from fastpref.plan.devices import find_device
from fastpref.plan.predict import Prediction, Predictor, Setup
from fastpref.plan.workload import GroupLengths
from fastpref.training.trainer import Trainer
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display

TOLERANCE = 0.15
PAIRS = 4  # of a step, and of the data


def _llama(width: int, inner: int, layers: int, vocabulary: int) -> Values:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "tie_word_embeddings": False,
    }


def _check(model: Values, lengths: Lengths, max_tokens: int, **sections: Any) -> Values:
    training = {
        "batch_size": PAIRS,
        "micro_batch_tokens": max_tokens,
        "activation_checkpointing": "full",
        **sections.pop("training", {}),
    }
    return {"model": model, "lengths": lengths, "training": training, "sections": sections}


_MEDIUM, _MEDIUM_LENGTHS = _llama(512, 1376, 6, 8000), Lengths((120, 0.4), (120, 0.4))
CPU_CHECKS = {
    "full": _check(_MEDIUM, _MEDIUM_LENGTHS, 800, training={"activation_checkpointing": "off"}),
    "full, checkpointed": _check(_MEDIUM, _MEDIUM_LENGTHS, 800),
    "lora": _check(
        _llama(768, 2048, 8, 8000),
        _MEDIUM_LENGTHS,
        800,
        adapter={"name": "lora", "r": 16},
        training={"activation_checkpointing": "selective"},
    ),
    "frozen reference": _check(_MEDIUM, _MEDIUM_LENGTHS, 4096, reference="frozen"),
    "long, large vocabulary": _check(
        _llama(256, 640, 4, 64000), Lengths((500, 0.1), (400, 0.2)), 4096
    ),
    "reward model": _check(_MEDIUM, _MEDIUM_LENGTHS, 800, loss="bradley_terry"),
    "reward model, lora": _check(
        _llama(768, 2048, 8, 8000),
        _MEDIUM_LENGTHS,
        800,
        loss="bradley_terry",
        adapter={"name": "lora", "r": 16},
        training={"activation_checkpointing": "selective"},
    ),
}
GPU_CHECKS = {
    name: _check(
        PRESETS[name].model,
        SHORT,
        16384,
        training={"batch_size": 32},
        **({"adapter": PRESETS[name].adapter} if PRESETS[name].adapter else {}),
    )
    for name in ("lora-8b", "qlora-8b", "full-1.5b")
}
CHECKS = {**CPU_CHECKS, **GPU_CHECKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=list(CPU_CHECKS))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(measure(name, Path(folder))))
        return
    rows = []
    for name in options.check:
        with tempfile.TemporaryDirectory(prefix="plan-check-") as folder:
            rows.append(row(name, Path(folder)))
    if options.out is not None:
        result = {"environment": environment.describe(), "rows": rows}
        options.out.write_text(result_json.dumps(result))
    sys.exit(any(abs(row["error"]) > TOLERANCE for row in rows))


def row(name: str, folder: Path) -> Values:
    """Predict one check, measure it, and print both."""
    config = write(name, folder)
    predicted = predict(config)
    # Freed blocks of any size go back to the system at once, so resident memory is in use.
    malloc = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.plans.check",
            "--measure",
            name,
            str(folder),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **malloc},
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    error = predicted.parts.total / measured["bytes"] - 1
    print(
        f"{name}: predicted {predicted.parts.total / 2**20:,.0f} MiB ({predicted.moment}), "
        f"measured {measured['bytes'] / 2**20:,.0f} MiB, {error:+.1%}, {measured['seconds']:.0f} s",
        flush=True,
    )
    return {
        "name": name,
        "moment": predicted.moment,
        "parts": asdict(predicted.parts),
        "predicted_bytes": predicted.parts.total,
        "measured_bytes": measured["bytes"],
        "error": error,
        "predicted_step_seconds": predicted.seconds,
        "measured_step_seconds": measured["step_seconds"],
        "seconds": measured["seconds"],
    }


def predict(config: configs.Config) -> Prediction:
    tokenizer = load_tokenizer(config.model)
    assert tokenizer is not None
    groups = load_data(config.data, "train", tokenizer)
    device = find_device("cpu" if config.training.device == "cpu" else "h100", torch.float32)
    return Predictor(device, len(tokenizer))(Setup(config, GroupLengths.of(groups), 1))


def write(name: str, folder: Path) -> configs.Config:
    """Write the data and the tokenizer of a check, and return its config."""
    check = CHECKS[name]
    vocabulary = check["model"]["vocab_size"]
    generator = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for lengths in check["lengths"].draw(check["training"]["batch_size"], 2048, 0):
            words = [
                " ".join(f"w{k}" for k in generator.integers(vocabulary - 3, size=n))
                for n in lengths
            ]
            texts = (words[0], f" {words[1]}", f" {words[2]}")
            file.write(json.dumps(dict(zip(TEXTS, texts, strict=True))) + "\n")
    word_tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    return config_of(name, folder, check["model"])


def config_of(name: str, folder: Path, model: Values, output: str = "run") -> configs.Config:
    check = CHECKS[name]
    on_cpu = name in CPU_CHECKS
    return configs.parse(
        {
            "model": {
                "init": "random",
                "config": model,
                "tokenizer": str(folder / "tokenizer"),
                "dtype": "float32" if on_cpu else "bfloat16",
            },
            "data": {"train": str(folder / "pairs.jsonl"), "cache": str(folder / "cache")},
            "loss": "dpo",
            "training": {
                **check["training"],
                "steps": 2,
                "device": "cpu" if on_cpu else "cuda",
                "checkpoint_every": None,
                "output_dir": str(folder / output),
            },
            **check["sections"],
        }
    )


def measure(name: str, folder: Path) -> Values:
    """Train a tiny model, then that of the check; return the peak bytes of the second."""
    if name in CPU_CHECKS:
        tiny = {**CHECKS[name]["model"], "hidden_size": 64, "intermediate_size": 64}
        tiny |= {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
        train(config_of(name, folder, tiny, "tiny"))
    gc.collect()
    device = "cpu" if name in CPU_CHECKS else "cuda"
    before = memory_now(device)
    start = time.perf_counter()
    steps = train(config_of(name, folder, CHECKS[name]["model"]))
    return {
        "bytes": memory_peak(device) - before,
        "step_seconds": steps,
        "seconds": time.perf_counter() - start,
    }


def train(config: configs.Config) -> float:
    """Train a config without exporting it, and return the mean time of a step."""
    trainer = Trainer(config, Display(Console(quiet=True)))
    start = time.perf_counter()
    trainer.loop([])
    return (time.perf_counter() - start) / trainer.steps


if __name__ == "__main__":
    main()
