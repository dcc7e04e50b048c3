"""The runs of the PRO study: labels, objectives and data of each, and samples on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastpref.reproduce import exports
from fastpref.reproduce.claims import EXAMPLES
from fastpref.reproduce.papers import pro_tables
from fastpref.reproduce.sample_scores import QUICK_SAMPLES
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import Job, Record

BATCH = 16  # pairs or groups; twice as many single responses
BETA, BETAS = 0.1, (0.03, 0.1, 0.3)
ALPHAS = (2.5, 10.0, 17.5, 25.0)
ALPHA, TUNED, TUNED_UNDESIRED = ALPHAS[0], 17.5, 10.0  # best in the paper's Table 2
STRONG_BETAS = (1.0, 10.0)  # ten and a hundred times BETA
DESIRED, UNDESIRED = RARE = ("1 % desired", "1 % undesired")
SCORED = {2: "best and random", 4: "4 responses"}
METHODS: dict[str, tuple[str, str]] = {  # kind of the data, name of the objective
    "dpo": ("pairs", "dpo"),
    "nca": ("pairs", "nca_pair"),
    "pro_p": ("pairs", "pro_p"),
    "kto": ("singles", "kto"),
    "pro_b": ("singles", "pro_b"),
}
THEOREMS = "theorems"


def run(method: str, beta: float = BETA) -> str:
    """Label of a run on all pairs or labels."""
    return f"{method}, β {beta:g}"


def rare(label: str, alpha: float | None = None, beta: float = BETA) -> str:
    """Label of a run with 1 % of a label: of KTO, or of PRO-B with an alpha."""
    name = "kto" if alpha is None else f"pro_b {alpha:g}"
    return f"{name}, {label}" + ("" if beta == BETA else f", β {beta:g}")


def scored(name: str, count: int) -> str:
    """Label of a run on groups of scored responses."""
    return f"{name}, {count} responses"


FOLLOWED = tuple(run(method) for method in ("dpo", "kto", "pro_p", "pro_b"))
FEW = ("dpo", "pro_p")  # of a pretrained model, whose steps take seconds


def jobs(seed: int, size: Size) -> list[Job]:
    theorems = Job(THEOREMS, seed, {}, function=pro_tables.theorems)
    if size.model is not None:
        short = {"batch_size": BATCH // 2, "steps": 3 if size.quick else 40}
        few = [_job(seed, run(k), *METHODS[k], training=short) for k in FEW]
        return [theorems, *few]
    betas = (BETA,) if size.quick else BETAS
    followed = _followed(math.ceil(size.train * size.per_prompt / BATCH), size.quick)
    sweep = [
        _job(seed, run(method, beta), kind, name, beta=beta)
        for method, (kind, name) in METHODS.items()
        for beta in betas
    ]
    sweep = [followed(job) if job.label in FOLLOWED else job for job in sweep]
    groups = [
        _job(seed, scored(name, count), kind, name)
        for name in ("nca", "pro_s")
        for count, kind in SCORED.items()
    ]
    return [theorems, *sweep, *_imbalanced(seed, size.quick), *groups]


def _imbalanced(seed: int, quick: bool) -> list[Job]:
    """Runs with 1 % of a label, whose loss counts a hundredfold."""
    all_jobs = []
    for label in RARE:
        side = {("un" if label == UNDESIRED else "") + "desirable_weight": 100.0}
        all_jobs.append(_job(seed, rare(label), label, "kto", **side))
        for alpha in (ALPHA, TUNED) if quick else ALPHAS:
            all_jobs.append(_job(seed, rare(label, alpha), label, "pro_b", alpha=alpha, **side))
        for beta in STRONG_BETAS if label == DESIRED and not quick else ():
            name = rare(label, ALPHA, beta)
            all_jobs.append(_job(seed, name, label, "pro_b", beta=beta, **side))
    return all_jobs


def _job(
    seed: int, label: str, kind: str, name: str, training: Any = None, **options: float
) -> Job:
    singles = kind in ("singles", *RARE)
    config = {
        "loss": {"name": name, "beta": BETA, **options},
        "training": {"batch_size": 2 * BATCH if singles else BATCH, **(training or {})},
    }
    return Job(label, seed, config, kind, scores_samples=training is None)


def _followed(steps: int, quick: bool) -> Callable[[Job], Job]:
    """A change of jobs: they export the model after a third of the steps, and sample from it."""

    def follow(job: Job) -> Job:
        training = job.config["training"] | {"export_every": max(1, steps // 3)}
        measure = measure_quick if quick else measure_first
        return replace(job, config=job.config | {"training": training}, measure=measure)

    return follow


FIRST, BEGIN = "first", "begin"  # families of samples after a third of the steps, and before them


def measure_first(trainer: Any, job: Job, count: int = EXAMPLES) -> Record:
    """Samples after a third of the steps, and in one run of the model that all begin with."""
    first = trainer.config.training.export_every
    record: Record = {"step": trainer.step, **exports.score(trainer, job, first, FIRST, count)}
    if job.label == FOLLOWED[0]:
        record |= exports.score(trainer, job, 0, BEGIN, count)
    exports.clear(trainer)
    return record


def measure_quick(trainer: Any, job: Job) -> Record:
    """The same with a few samples."""
    return measure_first(trainer, job, QUICK_SAMPLES)
