"""Error of the sketches of a pretrained model's scores."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration.runs import OBJECTIVES, make_trainer
from fastpref import ops
from fastpref.model.policy import ScoreOptions
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer

SKETCHES, SKETCHED_BATCHES, SKETCHED_PAIRS = (1024, 4096, 16384), 4, 8


def sketch_errors(folder: Path, model: Path) -> dict[str, Any]:
    """Deviations of sketched norms and cosines of a model's batches from the exact ones."""
    trainer = make_trainer(
        folder, 0, "sketch", {"steps": 1, "batch_size": SKETCHED_PAIRS},
        model={"path": str(model), "dtype": "float32"}, loss=OBJECTIVES["dpo"],
    )  # fmt: skip
    split = trainer.run.train
    errors: dict[int, list[tuple[float, float]]] = {rows: [] for rows in SKETCHES}
    for number in range(SKETCHED_BATCHES):
        first = number * SKETCHED_PAIRS
        indices = list(range(first, first + SKETCHED_PAIRS))
        log_r_star, cosine = batch_numbers(trainer, split, indices, None)
        for rows, deviations in errors.items():
            sketched = batch_numbers(trainer, split, indices, rows)
            deviations.append((sketched[0] - log_r_star, sketched[1] - cosine))
    return {
        "vocabulary": trainer.policy.base.get_output_embeddings().weight.shape[0],
        "batches": SKETCHED_BATCHES,
        "pairs": SKETCHED_PAIRS,
        "rms_deviation": {
            str(rows): {
                name: statistics.fmean(value**2 for value in column) ** 0.5
                for name, column in zip(
                    ("log_r_star", "cosine"), zip(*values, strict=True), strict=True
                )
            }
            for rows, values in errors.items()
        },
    }


@torch.no_grad()
def batch_numbers(
    trainer: Trainer, split: DataSplit, indices: list[int], rows: int | None
) -> tuple[float, float]:
    """log r* and the cosine of a batch's scores."""
    batches = trainer.policy.batches(split.groups, indices)
    output = trainer.forward(batches, split.reference, scores=ScoreOptions(sums=True, rows=rows))
    assert output.score_sums is not None
    chosen, rejected, cosine = ops.batch_geometry(output.score_sums, len(indices))
    return (rejected.log() - chosen.log()).item(), cosine.item()
