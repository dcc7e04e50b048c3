"""The runs of a study: for each seed a model that has learnt to speak, and all jobs from it."""

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
from fastpref.reproduce.samples_judge import judge
from fastpref.reproduce.study import Job, Outcome, Record, Study, load
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class Size:
    """How large a reproduction is: the model, the groups of responses, the seeds."""

    name: str
    hidden: int
    layers: int
    max_length: int
    prompts: int
    seeds: int
    workers: int  # runs at a time, one thread each
    dtype: str = "float32"
    rate: float = 1.0  # of the learning rates, which are those of the small model

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


SPEECH_STEPS = 150
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
    """Train everything, seed by seed in the order of the jobs; run directories go to `folder`."""
    quick = size.name == "quick"
    jobs = [job for seed in range(size.seeds) for job in study.jobs(seed, quick)]
    for seed in range(size.seeds):
        if groups is None:
            rows = graded.groups(size.prompts, seed)
        else:
            rows = data.read(groups, size.max_length, size.prompts)
        for kind in sorted({study.speaks, *(job.data for job in jobs)}):
            data.write(folder / f"seed-{seed}" / "data", kind, seed, rows)
    display.phase(study.name, len(jobs) + size.seeds)
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(size.workers, context, _start) as pool:
        speaking = pool.map(partial(speak, folder, study.name, size), range(size.seeds))
        for done, _ in enumerate(speaking, 1):
            display.advance(done)
        for outcome in pool.map(partial(train, folder, study.name, size, groups is None), jobs):
            outcomes.append(outcome)
            display.advance(size.seeds + len(outcomes))
    return outcomes


def _start() -> None:
    """Of each process: one thread, and no progress bars but ours."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def speak(folder: Path, name: str, size: Size, seed: int) -> None:
    """Learn responses from random weights: the model at which all jobs of a seed begin."""
    study = load(name)
    trainer = make_trainer(
        folder,
        size,
        Job("sft", seed, {}, study.speaks),
        {
            "model": {"init": "random", "dtype": "float32", "config": size.llama},
            "loss": study.speech,
            "optim": {"lr": 3e-3 * math.sqrt(size.rate), "schedule": "cosine", "warmup_steps": 10},
            "training": {"batch_size": 16, "steps": SPEECH_STEPS},
        },
    )
    trainer.loop([])
    trainer.export()


def train(folder: Path, name: str, size: Size, generated: bool, job: Job) -> Outcome:
    """One run from the model of its seed, or what it does alone."""
    if job.alone is not None:
        return Outcome(job.label, job.seed, [_rounded(line) for line in job.alone(job)])
    study = load(name)
    spoken = folder / f"seed-{job.seed}" / "sft" / "model"
    model = {"path": str(spoken), "dtype": size.dtype}
    sections = merged({"model": model}, study.training, job.config)
    sections["optim"]["lr"] *= size.rate
    if study.by_epoch:
        source = data.files(folder / f"seed-{job.seed}" / "data", job.data)[0]
        rows = len(source.read_text().splitlines())
        epoch = math.ceil(rows / sections["training"]["batch_size"])
        sections["training"] |= {"log_every": epoch, "eval_every": epoch}
    trainer = make_trainer(folder, size, job, sections)
    trainer.loop([])
    records = metrics.read(trainer.run.folder / "metrics.jsonl")
    names = {"step", *study.keep}
    kept = [{name: line[name] for name in line if name in names} for line in records]
    if job.measure is not None:
        kept.append({"step": trainer.step, **job.measure(trainer, job)})
    if job.judged and generated:
        held_out = trainer.config.data.eval
        kept.append({"step": trainer.step, **judge(trainer.export(), str(held_out), job.seed)})
    return Outcome(job.label, job.seed, [_rounded(line) for line in kept])


def make_trainer(folder: Path, size: Size, job: Job, sections: dict[str, Any]) -> Trainer:
    """A trainer on the files of a job; its run directory is `folder / seed-N / label`."""
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
    """Sections of several configs; of a section in more than one, the later fields count.

    An objective is taken whole: its options belong to its name.
    """
    made: dict[str, Any] = {}
    for sections in configs:
        for name, section in sections.items():
            joins = isinstance(section, dict) and name != "loss"
            made[name] = {**made.get(name, {}), **section} if joins else section
    return made


def _rounded(line: Record) -> Record:
    """Five digits are enough, and a fifth of the file."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in line.items()
    }
