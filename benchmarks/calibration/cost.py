"""Time of a training step by scope of the calibration, and of the ops of the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration.runs import BATCH, LLAMA, OBJECTIVES, make_trainer
from fastpref import ops
from fastpref.bench import timer
from fastpref.training.trainer import Trainer

T, D, V = 2048, 512, 32000  # shape of the head whose ops are timed
ROUNDS, STEPS_PER_TURN = 7, 4


def overhead(folder: Path) -> dict[str, Any]:
    """Measure seconds of a training step by scope of calibration, and of the head's two ops."""
    trainers = {
        scope: make_trainer(
            folder,
            0,
            f"overhead-{scope}",
            {"steps": 1, "batch_size": BATCH, "log_every": 1000},
            model={"init": "random", "dtype": "float32", "config": LLAMA},
            loss=OBJECTIVES["dpo"],
            calibration=None if scope == "none" else {"scope": scope},
        )
        for scope in ("none", "head", "last_adapter", "full")
    }
    steps: dict[str, Callable[[], Any]] = {
        scope: partial(take_steps, trainer) for scope, trainer in trainers.items()
    }
    seconds, _ = timer.interleave(steps, "cpu", ROUNDS, "none")
    per_step = {
        scope: timer.summary([value / STEPS_PER_TURN for value in values])
        for scope, values in seconds.items()
    }
    ops_seconds, _ = timer.interleave(head_ops(), "cpu", ROUNDS, "linear_logps")
    return {
        "model": LLAMA,
        "batch_size": BATCH,
        "seconds_per_step": per_step,
        "head": {"T": T, "D": D, "V": V, "dtype": "float32"},
        "seconds_of_head": {name: timer.summary(values) for name, values in ops_seconds.items()},
    }


def take_steps(trainer: Trainer) -> None:
    trainer.steps = trainer.step + STEPS_PER_TURN
    trainer.loop([])


def head_ops() -> dict[str, Callable[[], Any]]:
    """Ops to time: log-probs with gradients, with the batch's scores too, and geometry by pairs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (T, V))
    weight *= D**-0.5
    labels = torch.randint(V, (T,), generator=generator)

    def logps(with_scores: bool, rows: int | None = None) -> tuple[Tensor, ...]:
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        if with_scores:
            values, _ = ops.linear_logps_and_scores(*inputs, labels, T // 2, rows=rows)
        else:
            values = ops.linear_logps(*inputs, labels)
        return torch.autograd.grad(values.sum(), inputs)

    def geometry(pairs: int) -> ops.ScoreGeometry:
        offsets = torch.linspace(0, T, 2 * pairs + 1, dtype=torch.int64)
        return ops.score_geometry(hidden.detach(), weight.detach(), labels, offsets, per_pair=True)

    runs: dict[str, Callable[[], Any]] = {
        "linear_logps": partial(logps, False),
        "with the batch's scores, 4,096 rows": partial(logps, True, ops.SKETCH_ROWS),
        "with the batch's scores, exact": partial(logps, True, None),
    }
    return runs | {f"score_geometry, {n} pairs": partial(geometry, n) for n in (1, 4, 16)}
