"""Run a study: for each seed a start model, and from it all jobs.

Every finished run leaves `outcome.json` in its run directory, and a study that is run again in the
same folder continues with the runs that are missing.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

from fastpref import config as configs
from fastpref import metrics
from fastpref.reproduce import data
from fastpref.reproduce.claims import EXAMPLES
from fastpref.reproduce.held_out import describe_pairs, score_pairs
from fastpref.reproduce.sample_scores import QUICK_SAMPLES, score_samples
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import START, Job, Outcome, Record, Study, load
from fastpref.training.trainer import Trainer
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display


def run(
    study: Study, size: Size, folder: Path, groups: Path | None, display: Display
) -> list[Outcome]:
    """Run all jobs, seed by seed in their order; run directories go to `folder`."""
    jobs = [job for seed in range(size.seeds) for job in study.jobs(seed, size)]
    for seed in range(size.seeds):
        home = folder / f"seed-{seed}" / "data"
        parts = data.groups_of(size, seed, groups)
        kinds = {job.data for job in jobs} | {job.held_out or study.held_out for job in jobs}
        for kind in sorted(kinds | {study.sft_data}):
            data.write(home, kind, seed, parts, size.held_out if size.quick else None)
        data.train_tokenizer(home, size.llama["vocab_size"])
    display.phase(study.name, len(jobs) + size.seeds)
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // size.workers)
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(size.workers, context, _start_worker, (threads,)) as pool:
        starts = pool.map(partial(start, folder, study.name, size), range(size.seeds))
        for outcome in starts:
            outcomes.append(outcome)
            display.advance(len(outcomes))
        for outcome in pool.map(partial(train, folder, study.name, size, groups is None), jobs):
            outcomes.append(outcome)
            display.advance(len(outcomes))
    return outcomes


def _start_worker(threads: int) -> None:
    """Set the threads of the process, and turn off other libraries' progress bars."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def start(folder: Path, name: str, size: Size, seed: int) -> Outcome:
    """The model that all jobs of a seed start from, scored on the held-out pairs.

    Unless it is pretrained, it is trained from random weights on the warm-up rows.
    """
    study = load(name)
    job = Job(START, seed, {}, study.sft_data)
    key = _start_key(folder, study, size, seed)
    outcome = finished(folder, job, key)
    if outcome is not None:
        return outcome
    home = folder / f"seed-{seed}" / "data"
    sections: dict[str, Any] = {
        "model": start_model(folder, size, seed),
        "data": {"train": str(data.files(home, study.sft_data).warm_up)},
        "loss": study.sft_loss,
        "optim": {"lr": 3e-3 * math.sqrt(size.lr_scale), "schedule": "cosine", "warmup_steps": 10},
        "training": {"batch_size": 16, "steps": study.sft_steps},
    }
    if size.model is None:
        tokenizer = str(home / "tokenizer")
        config = size.llama
        sections["model"] = {
            "init": "random", "dtype": "float32", "config": config, "tokenizer": tokenizer
        }  # fmt: skip
    trainer = make_trainer(folder, size, job, sections)
    if size.model is None:
        trainer.loop([])
        trainer.export()
    held_out = data.files(home, study.held_out).held_out
    arrays = score_pairs(trainer, held_out) | describe_pairs(trainer, held_out)
    return _finish(folder, key, Outcome(START, seed, [], arrays))


def start_model(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """The section `model` of the jobs of a seed."""
    warmed_up = folder / f"seed-{seed}" / START / "model"
    return {"path": str(size.model or warmed_up), "dtype": size.dtype}


def train(folder: Path, name: str, size: Size, generated: bool, job: Job) -> Outcome:
    """Train one job from the model of its seed, or call its `function` instead."""
    study = load(name)
    key = _job_key(folder, study, size, job)
    outcome = finished(folder, job, key)
    if outcome is not None:
        return outcome
    if job.function is not None:
        return _finish(folder, key, _outcome(job, job.function(job)))
    home = folder / f"seed-{job.seed}" / "data"
    sections = merged({"model": start_model(folder, size, job.seed)}, study.training, job.config)
    lr = sections["optim"]["lr"] * size.lr_scale if size.model is None else study.model_lr
    sections["optim"]["lr"] = lr
    if study.by_epoch:
        rows = data.files(home, job.data).train.read_text(encoding="utf-8").count("\n")
        epoch = math.ceil(rows / sections["training"]["batch_size"])
        sections["training"] |= {f"{k}_every": epoch for k in ("log", "eval", "export")}
    trainer = make_trainer(folder, size, job, sections)
    if job.learn is not None:
        lines = job.learn(trainer, job)
    else:
        trainer.loop([])
        records = metrics.read_records(trainer.run.folder / "metrics.jsonl")
        names = {"step", *study.metrics}
        lines = [{name: line[name] for name in line if name in names} for line in records]
    held_out = data.files(home, job.held_out or study.held_out).held_out
    lines.append(dict(score_pairs(trainer, held_out)))
    if job.held_out is not None:
        lines.append(dict(describe_pairs(trainer, held_out)))
    if job.measure is not None:
        lines.append({"step": trainer.step, **job.measure(trainer, job)})
    if job.scores_samples and generated:
        count = QUICK_SAMPLES if size.quick else EXAMPLES
        lines.append(dict(score_samples(trainer.export(), held_out, job.seed, count)))
    return _finish(folder, key, _outcome(job, lines))


def _outcome(job: Job, lines: list[Record]) -> Outcome:
    """Sort the lists among the metrics into the arrays of an outcome."""
    arrays = {
        name: value for line in lines for name, value in line.items() if isinstance(value, list)
    }
    records = [
        {name: value for name, value in line.items() if name not in arrays} for line in lines
    ]
    return Outcome(job.label, job.seed, [_rounded(line) for line in records if line], arrays)


def _start_key(folder: Path, study: Study, size: Size, seed: int) -> str:
    """Hash of all that determines the start of a seed; of a size, the number of seeds is free."""
    home = folder / f"seed-{seed}" / "data"
    files = (data.files(home, study.sft_data).warm_up, data.files(home, study.held_out).held_out)
    settings = (study.sft_loss, study.sft_steps, replace(size, seeds=0, workers=0))
    return atomic_files.sha256(repr(settings), *map(atomic_files.file_sha256, files))


def _job_key(folder: Path, study: Study, size: Size, job: Job) -> str:
    """Hash of all that determines a job, functions by their names."""
    home = folder / f"seed-{job.seed}" / "data"
    held_out = data.files(home, job.held_out or study.held_out).held_out
    names = [f.__qualname__ for f in (job.measure, job.function, job.learn) if f is not None]
    settings = (
        study.training,
        study.metrics,
        study.model_lr,
        job.config,
        job.scores_samples,
        names,
    )
    hashes = [atomic_files.file_sha256(p) for p in (data.files(home, job.data).train, held_out)]
    return atomic_files.sha256(_start_key(folder, study, size, job.seed), repr(settings), *hashes)


def _run_folder(folder: Path, job: Job) -> Path:
    label = job.label.replace(" ", "-").replace("/", "-")
    return folder / f"seed-{job.seed}" / label


def finished(folder: Path, job: Job, key: str) -> Outcome | None:
    """The outcome that an earlier call left, or None after clearing what an interrupted one left.

    Raises UserError if the run had other settings.
    """
    home = _run_folder(folder, job)
    path = home / "outcome.json"
    if not path.exists():
        atomic_files.remove(home)
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.pop("key") != key:
        raise UserError(f"--runs: {home} is a run with other settings; choose another folder")
    return Outcome(**record)


def _finish(folder: Path, key: str, outcome: Outcome) -> Outcome:
    path = _run_folder(folder, Job(outcome.label, outcome.seed, {})) / "outcome.json"
    with atomic_files.replacing(path) as temporary:
        temporary.write_text(json.dumps({"key": key, **vars(outcome)}) + "\n", encoding="utf-8")
    return outcome


def make_trainer(folder: Path, size: Size, job: Job, sections: dict[str, Any]) -> Trainer:
    """Build a trainer on the files of a job; its run directory is `folder / seed-N / label`."""
    return Trainer(config_of(folder, size, job, sections), Display(Console(quiet=True)))


def config_of(folder: Path, size: Size, job: Job, sections: dict[str, Any]) -> configs.Config:
    """Config of a job: its sections, its files, and what all runs have in common."""
    paths = data.files(folder / f"seed-{job.seed}" / "data", job.data)
    shared = {
        "data": {
            "train": str(paths.train),
            "eval": str(paths.eval),
            "max_length": size.max_length,
            "cache": str(folder / "cache"),
        },
        "training": {
            "seed": job.seed,
            "activation_checkpointing": "off",
            "batch_invariant": False,
            "checkpoint_every": None,
            "output_dir": str(_run_folder(folder, job)),
        },
    }
    return configs.parse(merged(shared, sections))


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
