"""Incentives in the Disentanglement Band during training, and what became of log-probs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration.one_step import one_step
from benchmarks.calibration.runs import BATCH, HELD_OUT, LLAMA, OBJECTIVES, forward, make_trainer
from fastpref import metrics
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer
from fastpref.utils import result_json

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-4},
    # RMSprop with alpha 0 and a huge eps is gradient descent, here with a rate of 1e-3.
    "sgd": {"name": "rmsprop", "lr": 1e5, "alpha": 0.0, "eps": 1e8, "max_grad_norm": None},
}
# Statistics of the calibration; None: no calibration. See `calibration.statistics`.
METHODS = (None, "batch", "pairs")
SETTING = ("optimizer", "objective", "statistics", "scope")


@dataclass(frozen=True)
class Job:
    """One run from the SFT model of a seed."""

    seed: int
    optimizer: str
    objective: str
    statistics: str | None
    scope: str = "head"

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.objective}-{self.statistics}-{self.scope}-{self.seed}"


def jobs(seeds: int, objectives: Iterable[str]) -> list[Job]:
    """Objectives under AdamW, and DPO under gradient descent, which the theory describes.

    Each runs without calibration and with both kinds of it; CPO, whose incentives are far from
    even, also with the scores of all parameters.
    """
    settings = [("adamw", objective) for objective in objectives]
    if "dpo" in objectives:
        settings.append(("sgd", "dpo"))
    jobs = []
    for seed in range(seeds):
        jobs += [Job(seed, *setting, method) for setting in settings for method in METHODS]
        if "cpo" in objectives:
            jobs.append(Job(seed, "adamw", "cpo", "batch", "full"))
    return jobs


def study(folder: Path, options: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """Run SFT for each seed, then all jobs from it, except those in earlier results."""
    settings = {
        "model": LLAMA, "data": options.data.name, "train_pairs": options.steps * BATCH,
        "held_out_pairs": HELD_OUT, "batch_size": BATCH, "steps": options.steps,
        "objectives": OBJECTIVES, "optimizers": OPTIMIZERS,
    }  # fmt: skip
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        sft = list(pool.map(partial(sft_warm_up, folder), range(options.seeds)))
        start = json.loads(result_json.dumps({"settings": settings, "sft": sft}))  # rounded
        if earlier and {name: earlier[name] for name in start} != start:
            raise SystemExit("--add: the runs of the result file have other settings; leave it out")
        done = {json.dumps(_job(run)): run for run in earlier.get("runs", [])}
        all_jobs = jobs(options.seeds, options.objectives)
        new = [job for job in all_jobs if json.dumps(vars(job)) not in done]
        done |= {json.dumps(_job(run)): run for run in pool.map(partial(train, folder), new)}
    runs = [done[json.dumps(vars(job))] for job in all_jobs]
    return {
        "settings": settings,
        "seconds": round(time.monotonic() - started) + earlier.get("seconds", 0),
        "sft": sft,
        "summary": summary(runs),
        "runs": runs,
    }


def _job(run: dict[str, Any]) -> dict[str, Any]:
    return {field.name: run[field.name] for field in fields(Job)}


def sft_warm_up(folder: Path, seed: int) -> dict[str, float]:
    """Train on the chosen responses from random weights, and export the model."""
    trainer = make_trainer(
        folder,
        seed,
        "sft",
        {"epochs": 3, "batch_size": 8},
        model={"init": "random", "dtype": "float32", "config": LLAMA},
        loss="sft",
        optim={"lr": 3e-3, "schedule": "cosine", "warmup_steps": 10},
    )
    trainer.loop([])
    trainer.export()
    last = [line for line in records(trainer) if "eval_loss" in line][-1]
    chosen = last["eval_logps/chosen"] / last["eval_lengths/chosen"]
    return {"seed": seed, "held_out_logp_per_token": chosen}


def train(folder: Path, job: Job) -> dict[str, Any]:
    """Train one job; return its positions in the band and the final changes of log-probs."""
    calibration = None
    if job.statistics is not None:
        calibration = {"statistics": job.statistics, "scope": job.scope}
    trainer = make_trainer(
        folder,
        job.seed,
        job.name,
        {"epochs": 1, "batch_size": BATCH},
        model={"path": str(folder / str(job.seed) / "sft" / "model"), "dtype": "float32"},
        loss=OBJECTIVES[job.objective],
        # Changes are measured from the reference, even if the objective does not need one.
        reference="cached",
        calibration=calibration,
        monitor={"band_every": 1},
        optim=OPTIMIZERS[job.optimizer],
    )
    trainer.loop([])
    assert trainer.run.eval is not None
    result = {
        **vars(job),
        "in_training": in_training([line for line in records(trainer) if "loss" in line]),
        "train": outcome(trainer, trainer.run.train),
        "held_out": outcome(trainer, trainer.run.eval),
    }
    if job.seed == 0:
        result["one_step"] = one_step(trainer, trainer.run.eval)
    print(job.name, flush=True)
    return result


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return metrics.read_records(trainer.run.folder / "metrics.jsonl")


def in_training(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps, and the share of steps on each pathway.

    `band/*` is the band of a step's batch, with the applied incentives; the pathway of a step
    follows from the changes that it predicts.
    """
    names = [name for name in lines[-1] if name.startswith(("band/", "pair_band/", "calibration/"))]
    means = {name: statistics.fmean(line[name] for line in lines if name in line) for name in names}
    up = [line["band/dz_chosen"] >= 0 for line in lines]
    down = [line["band/dz_rejected"] <= 0 for line in lines]
    signs = list(zip(up, down, strict=True))
    pathways = {"i": (True, False), "ii": (False, True), "iii": (True, True)}
    return means | {f"pathway_{k}": signs.count(v) / len(lines) for k, v in pathways.items()}


@torch.no_grad()
def outcome(trainer: Trainer, data: DataSplit) -> dict[str, float]:
    """Changes of the log-probs of a split since the SFT model.

    chosen_change, rejected_change: mean change of the summed log-prob, nats. Shares of pairs:
    accuracy: the chosen log-prob changed by more than the rejected one. displaced: the chosen one
    fell. disentangled: the chosen one did not fall and the rejected one did not rise.
    """
    sides = []
    for step in data.plan.epoch():
        for indices in step:
            policy, reference, *_ = forward(trainer, data, indices)
            sides.append((policy.chosen - reference.chosen, policy.rejected - reference.rejected))
    chosen, rejected = (torch.cat(side).double() for side in zip(*sides, strict=True))
    columns = {
        "chosen_change": chosen,
        "rejected_change": rejected,
        "accuracy": chosen > rejected,
        "displaced": chosen < 0,
        "disentangled": (chosen >= 0) & (rejected <= 0),
    }
    return {name: values.double().mean().item() for name, values in columns.items()}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, minimum and maximum over the seeds, for each setting."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault(tuple(run[name] for name in SETTING), []).append(run)
    rows = []
    for setting, members in settings.items():
        row: dict[str, Any] = dict(zip(SETTING, setting, strict=True))
        for part in ("in_training", "train", "held_out"):
            for name in members[0][part]:
                values = [member[part][name] for member in members if name in member[part]]
                row[f"{part}/{name}"] = [statistics.fmean(values), min(values), max(values)]
        rows.append(row)
    return rows
