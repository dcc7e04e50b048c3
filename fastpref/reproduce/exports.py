"""Measurements of the models that a run exported on its way, as arrays under a family of their own.

A run exports its model where `training.export_every` is set; `FAMILY/win` and the others are those
of `sample_scores`.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastpref.data.synthetic import graded
from fastpref.reproduce.sample_scores import score_samples
from fastpref.reproduce.study import Job
from fastpref.training.trainer import Trainer
from fastpref.utils import atomic_files


def folder(trainer: Trainer, step: int) -> Path:
    """The model after a number of steps; 0 is the one that the run began with."""
    if step == 0:
        return Path(str(trainer.config.model.path))
    return trainer.run.folder / "exports" / f"step-{step}"


def score(trainer: Trainer, job: Job, step: int, family: str, count: int) -> dict[str, list[float]]:
    """Score at least `count` samples on held-out prompts of the model after a number of steps.

    Samples on a user's data, whose utilities are not known, have no scores.
    """
    held_out = Path(str(trainer.config.data.eval).removesuffix("-eval.jsonl") + "-held-out.jsonl")
    with held_out.open(encoding="utf-8") as lines:
        row = json.loads(next(lines))
    if graded.quality(row.get("chosen") or row["completion"], job.seed) is None:
        return {}
    scores = score_samples(folder(trainer, step), held_out, job.seed, count)
    return {f"{family}/{name.partition('/')[2]}": values for name, values in scores.items()}


def clear(trainer: Trainer) -> None:
    """Delete the exports of a run."""
    atomic_files.remove(trainer.run.folder / "exports")
