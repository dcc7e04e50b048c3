"""Measurements of the StaPO study: logits and samples after each epoch, and gradients.

`epoch N/…` are the scores of samples, as in `sample_scores`; `logits N/…` are of the pairs trained
on: `chosen` and `rejected` (summed log-probs, nats), `z` (difference of the log-probs per token,
nats), and `cluster` (the prompt). Epoch 0 is the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastpref import losses
from fastpref.data.dataset import load_groups
from fastpref.evaluation.evaluate import score
from fastpref.evaluation.sample import Sampler
from fastpref.logps import SequenceLogps
from fastpref.reproduce import exports
from fastpref.reproduce.claims import EXAMPLES
from fastpref.reproduce.held_out import describe_pairs
from fastpref.reproduce.sample_scores import QUICK_SAMPLES
from fastpref.reproduce.study import Job, Record
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

EPOCHS = (1, 2, 3, 4, 5)
LOGIT_EPOCHS = (0, 1, 3, 5)
BETA, LEFT, RIGHT = 2.0, 0.6, 0.8
TOKENS = 4  # of the responses of the theorems


def epoch(number: int) -> str:
    """Family of the samples after an epoch."""
    return f"epoch {number}"


def logits(number: int) -> str:
    """Family of the log-probs of the pairs trained on after an epoch."""
    return f"logits {number}"


def measure(trainer: Trainer, job: Job) -> Record:
    """Samples after every epoch, and log-probs of the pairs trained on after some."""
    return _measure(trainer, job, (0, *EPOCHS) if job.label == "stapo" else EPOCHS, EXAMPLES)


def measure_some(trainer: Trainer, job: Job) -> Record:
    """The same, with samples after epochs 1, 3 and 5."""
    return _measure(trainer, job, LOGIT_EPOCHS[1:], EXAMPLES)


def measure_quick(trainer: Trainer, job: Job) -> Record:
    """The same as `measure`, with a few samples."""
    return _measure(trainer, job, (0, *EPOCHS) if job.label == "stapo" else EPOCHS, QUICK_SAMPLES)


def measure_pretrained(trainer: Trainer, job: Job) -> Record:
    """The same of a pretrained model, which writes no recipes: entropy after epochs 1 and 5."""
    record = _measure(trainer, job, (EPOCHS[0], EPOCHS[-1]), EXAMPLES)
    return {
        name: value
        for name, value in record.items()
        if not (name.startswith("epoch") and name.endswith(("/win", "/malformed")))
    }


def measure_pretrained_quick(trainer: Trainer, job: Job) -> Record:
    """Only log-probs of the pairs trained on."""
    return _measure(trainer, job, (), 0)


def _measure(trainer: Trainer, job: Job, sampled: tuple[int, ...], count: int) -> Record:
    steps = trainer.plan.steps_per_epoch
    record: Record = {"step": trainer.step}
    for number in sampled:
        record |= exports.score(trainer, job, number * steps, epoch(number), count)
    clusters = describe_pairs(trainer, Path(str(trainer.config.data.train)))["pairs/cluster"]
    for number in LOGIT_EPOCHS:
        family = logits(number)
        record |= _log_probs(trainer, exports.folder(trainer, number * steps), family)
        record[f"{family}/cluster"] = clusters
    exports.clear(trainer)
    return record


def _log_probs(trainer: Trainer, model: Path, family: str) -> dict[str, list[float]]:
    """Log-probs of a model on the pairs trained on."""
    sampler, settings = Sampler(str(model)), trainer.config
    groups = load_groups(
        str(settings.data.train), sampler.tokenizer, settings.data, "pairwise", "train"
    )
    display = Display(Console(quiet=True))
    logps = score(sampler.policy, groups, settings.training, display).logps.numpy()
    chosen, rejected = logps.T
    z = -np.diff(logps / groups.response_lengths.reshape(-1, 2)).ravel()
    sides = {"chosen": chosen, "rejected": rejected, "z": z}
    return {
        f"{family}/{name}": [float(f"{number:.6g}") for number in side]
        for name, side in sides.items()
    }


def theorems(job: Job) -> list[Record]:
    """Deviations from section 3.2 and 3.3 over a range of Z, in fp64."""
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)
    two_sided = torch.sigmoid(-BETA * (z - LEFT)) - torch.sigmoid(BETA * (z - RIGHT))
    margins = {"beta": BETA, "left_margin": LEFT, "right_margin": RIGHT}
    chosen, rejected = incentives({"name": "stapo", **margins}, z)
    deviations = torch.stack([chosen - two_sided, rejected - two_sided]).abs()
    equal = {"name": "stapo", "beta": BETA, "left_margin": RIGHT, "right_margin": RIGHT}
    logit, half = BETA * (z - RIGHT), torch.full_like(z, 0.5)
    soft = 2 * binary_cross_entropy_with_logits(logit, half, reduction="none")
    one_sided, _ = incentives({"name": "simpo", "beta": BETA, "gamma": 1.0}, z)
    return [
        {
            "step": 0,
            "theorem/one_sided_least": one_sided.min().item(),
            "theorem/two_sided": deviations.max().item(),
            "theorem/equal_margins": (values(equal, z) - soft).abs().max().item(),
        }
    ]


def values(loss: dict[str, Any], z: Tensor) -> Tensor:
    """The loss of pairs with a contrastive logit, (B,)."""
    return _objective(loss, z, torch.zeros_like(z))


def incentives(loss: dict[str, Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """−dL/d(chosen) and dL/d(rejected) in the mean log-probs, divided by beta, (B,) each."""
    means = [z.clone().requires_grad_(), torch.zeros_like(z).requires_grad_()]
    up, down = torch.autograd.grad(_objective(loss, *means).sum(), means)
    return -up / loss["beta"], down / loss["beta"]


def _objective(loss: dict[str, Any], chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss of pairs of equally long responses with these mean log-probs, (B,)."""
    lengths = torch.full((len(chosen),), TOKENS)
    objective = losses.build(**loss)
    assert isinstance(objective, losses.PairwiseLoss)
    return objective(SequenceLogps(TOKENS * chosen, TOKENS * rejected, lengths, lengths), None).loss
