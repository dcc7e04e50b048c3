"""Run a study: for each seed an SFT warm-up, and from its model all jobs."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

from fastpref import config as configs
from fastpref import metrics
from fastpref.data.synthetic import graded
from fastpref.reproduce import data
from fastpref.reproduce.sample_scores import score_samples
from fastpref.reproduce.study import Job, Outcome, Record, Study, load
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class Size:
    """Size of a reproduction: the model, the groups of responses, the seeds."""

    name: str
    hidden: int
    layers: int
    max_length: int
    prompts: int
    seeds: int
    workers: int  # runs at a time, one thread each
    dtype: str = "float32"
    lr_scale: float = 1.0  # factor on the learning rates, which suit the small model

    @property
    def llama(self) -> dict[str, Any]:
        heads = max(4, self.hidden // 64)
        return {
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.max_length,
        }


SFT_STEPS = 150
SIZES = {
    size.name: size
    for size in (
        Size("quick", 64, 2, 128, 200, 1, 2),
        Size("cores", 128, 2, 128, 500, 3, 2),
        Size("gpu", 1024, 12, 512, 600, 3, 1, "bfloat16", 0.1),
    )
}


def run(
    study: Study, size: Size, folder: Path, groups: Path | None, display: Display
) -> list[Outcome]:
    """Run all jobs, seed by seed in their order; run directories go to `folder`."""
    quick = size.name == "quick"
    jobs = [job for seed in range(size.seeds) for job in study.jobs(seed, quick)]
    for seed in range(size.seeds):
        if groups is None:
            rows = graded.groups(size.prompts, seed)
        else:
            rows = data.read(groups, size.max_length, size.prompts)
        for kind in sorted({study.sft_data, *(job.data for job in jobs)}):
            data.write(folder / f"seed-{seed}" / "data", kind, seed, rows)
    display.phase(study.name, len(jobs) + size.seeds)
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(size.workers, context, _start_worker) as pool:
        warm_ups = pool.map(partial(sft_warm_up, folder, study.name, size), range(size.seeds))
        for done, _ in enumerate(warm_ups, 1):
            display.advance(done)
        for outcome in pool.map(partial(train, folder, study.name, size, groups is None), jobs):
            outcomes.append(outcome)
            display.advance(size.seeds + len(outcomes))
    return outcomes


def _start_worker() -> None:
    """Set one thread for the process, and turn off other libraries' progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def sft_warm_up(folder: Path, name: str, size: Size, seed: int) -> None:
    """Train a model on responses from random weights; all jobs of the seed start from it."""
    study = load(name)
    trainer = make_trainer(
        folder,
        size,
        Job("sft", seed, {}, study.sft_data),
        {
            "model": {"init": "random", "dtype": "float32", "config": size.llama},
            "loss": study.sft_loss,
            "optim": {
                "lr": 3e-3 * math.sqrt(size.lr_scale),
                "schedule": "cosine",
                "warmup_steps": 10,
            },
            "training": {"batch_size": 16, "steps": SFT_STEPS},
        },
    )
    trainer.loop([])
    trainer.export()


def train(folder: Path, name: str, size: Size, generated: bool, job: Job) -> Outcome:
    """Train one job from the model of its seed, or call its `function` instead."""
    if job.function is not None:
        return Outcome(job.label, job.seed, [_rounded(line) for line in job.function(job)])
    study = load(name)
    sft_model = folder / f"seed-{job.seed}" / "sft" / "model"
    model = {"path": str(sft_model), "dtype": size.dtype}
    sections = merged({"model": model}, study.training, job.config)
    sections["optim"]["lr"] *= size.lr_scale
    if study.by_epoch:
        source = data.files(folder / f"seed-{job.seed}" / "data", job.data)[0]
        rows = len(source.read_text().splitlines())
        epoch = math.ceil(rows / sections["training"]["batch_size"])
        sections["training"] |= {"log_every": epoch, "eval_every": epoch}
    trainer = make_trainer(folder, size, job, sections)
    trainer.loop([])
    records = metrics.read_records(trainer.run.folder / "metrics.jsonl")
    names = {"step", *study.metrics}
    lines = [{name: line[name] for name in line if name in names} for line in records]
    if job.measure is not None:
        lines.append({"step": trainer.step, **job.measure(trainer, job)})
    if job.scores_samples and generated:
        scores = score_samples(trainer.export(), str(trainer.config.data.eval), job.seed)
        lines.append({"step": trainer.step, **scores})
    return Outcome(job.label, job.seed, [_rounded(line) for line in lines])


def make_trainer(folder: Path, size: Size, job: Job, sections: dict[str, Any]) -> Trainer:
    """Build a trainer on the files of a job; its run directory is `folder / seed-N / label`."""
    home = folder / f"seed-{job.seed}"
    train, held_out = data.files(home / "data", job.data)
    shared = {
        "data": {
            "train": str(train),
            "eval": str(held_out),
            "max_length": size.max_length,
            "cache": str(folder / "cache"),
        },
        "training": {
            "seed": job.seed,
            "activation_checkpointing": "off",
            "batch_invariant": False,
            "checkpoint_every": None,
            "output_dir": str(home / job.label.replace(" ", "-").replace("/", "-")),
        },
    }
    return Trainer(configs.parse(merged(shared, sections)), Display(Console(quiet=True)))


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    """Merge the sections of several configs; later fields override earlier ones.

    `loss` is replaced as a whole, since its options belong to its name.
    """
    result: dict[str, Any] = {}
    for sections in configs:
        for name, section in sections.items():
            if isinstance(section, dict) and name != "loss":
                result[name] = {**result.get(name, {}), **section}
            else:
                result[name] = section
    return result


def _rounded(line: Record) -> Record:
    """Round to five digits, which makes the file five times smaller."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in line.items()
    }
