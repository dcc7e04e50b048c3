"""Bands of batches in the runs of the Reward Calibration paper, as values for each pair.

A batch has one band. Its values are repeated for each of its pairs, which are a cluster, so that
sample sizes count pairs and errors those of batches. In training, clusters are blocks of steps,
since neighboring steps resemble each other.
"""

from __future__ import annotations

import math

from fastpref import metrics, ops
from fastpref.dynamics.band import half_band, parameter_scores
from fastpref.logps import SequenceLogps
from fastpref.model.policy import ScoreOptions
from fastpref.ops import ScoreGeometry
from fastpref.reproduce.study import Job, Record
from fastpref.training.trainer import Trainer

PAIRS = 4  # of a batch
BLOCK = 10  # steps
# Pathways of a step's batch, by the changes of the log-probs that its band predicts.
STEPS = ("inside", "both_up", "both_down")


def steps(trainer: Trainer, job: Job) -> Record:
    """Pathways of the batches in training, by the incentives as they were applied."""
    lines = metrics.read_records(trainer.run.folder / "metrics.jsonl")
    lines = [line for line in lines if "band/dz_chosen" in line]
    values: dict[str, list[float]] = {f"steps/{name}": [] for name in (*STEPS, "cluster")}
    for number, line in enumerate(lines):
        up, down = line["band/dz_chosen"] >= 0, line["band/dz_rejected"] <= 0
        pathway = {"inside": up and down, "both_up": up and not down, "both_down": down and not up}
        for name in STEPS:
            values[f"steps/{name}"] += PAIRS * [float(pathway[name])]
        values["steps/cluster"] += PAIRS * [float(number // BLOCK)]
    return dict(values)


def steps_and_bands(trainer: Trainer, job: Job) -> Record:
    """`steps`, and bands of training batches by the scores of the head and of all parameters.

    `bands/overlap` is the intersection of both bands over their union, and `bands/head`,
    `bands/all` are half their widths, −log of the cosine. A batch with a cosine that is not
    positive has no edges, and is left out.
    """
    split = trainer.run.train
    values: dict[str, list[float]] = {
        f"bands/{name}": [] for name in ("overlap", "head", "all", "cluster")
    }
    for first in range(0, len(split.groups) - PAIRS + 1, PAIRS):
        batches = trainer.policy.batches(split.groups, list(range(first, first + PAIRS)))
        output = trainer.forward(batches, split.reference, scores=ScoreOptions(sums=True))
        assert isinstance(output.policy, SequenceLogps) and output.score_sums is not None
        by_all = parameter_scores(output.policy, trainer.parameters)
        head, full = (ops.batch_geometry(sums, PAIRS) for sums in (output.score_sums, by_all))
        if min(head.cosine.item(), full.cosine.item()) <= 0:
            continue
        row = _overlap(_edges(head), _edges(full)), _half_width(head), _half_width(full), first
        for name, value in zip(values, row, strict=True):
            values[name] += PAIRS * [float(value)]
    return {**steps(trainer, job), **values}


def _half_width(geometry: ScoreGeometry) -> float:
    return half_band(geometry.cosine).item()


def _edges(geometry: ScoreGeometry) -> tuple[float, float]:
    center = math.log(geometry.rejected_norm.item()) - math.log(geometry.chosen_norm.item())
    return center - _half_width(geometry), center + _half_width(geometry)


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two intervals."""
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / ((a[1] - a[0]) + (b[1] - b[0]) - intersection)
