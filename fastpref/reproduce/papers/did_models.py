"""Measurements of models trained by DPO and DPO-PG: gradients, and the entropy of the DID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastpref.dynamics.dpo_pg import inner_product, project_
from fastpref.evaluation.did_entropy import Estimate
from fastpref.logps import SequenceLogps
from fastpref.model.generate import Sampling
from fastpref.reproduce.claims import Measurement, Missing
from fastpref.reproduce.data import files
from fastpref.reproduce.study import Job, Outcome, Record
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

PAIRS, SAMPLES = 16, 4  # for each prompt: of π and the reference, and of π'
GRADIENT_PAIRS = 16
LEAST_SHARE = 0.5  # of prompts with a slope that is not negative; chance is one half
# π' of a small model; the paper's 1e-6 and 150 steps of warm-up are for 7 billion parameters.
_OVERRIDES = ("optim.lr=2e-4", "optim.warmup_steps=10", "training.batch_size=32")


def gradients(trainer: Trainer, job: Job) -> Record:
    """Cosines of DPO-PG's direction with the gradients that its theorems are about.

    `gradients/chosen`, the least, and `gradients/rejected`, the largest, with the gradients of mean
    log-probs, for each pair and all of them together; `gradients/loss`, the largest, with those of
    DPO's loss of each pair.
    """
    everything = list(range(GRADIENT_PAIRS))
    batches = [[index] for index in everything] + [everything]
    chosen, rejected, losses = [], [], []
    for indices in batches:
        up, down = _log_prob_gradients(trainer, indices)
        direction = [-g for g in up]
        project_(direction, [-g for g in down])
        step = [-g for g in direction]
        chosen.append(_cosine(step, up))
        rejected.append(_cosine(step, down))
        if len(indices) == 1:
            # DPO's loss falls with z_w − z_l, whatever the reference.
            losses.append(-_cosine(step, [u - d for u, d in zip(up, down, strict=True)]))
    return {
        "step": trainer.step,
        "gradients/chosen": min(chosen),
        "gradients/rejected": max(rejected),
        "gradients/loss": max(losses),
    }


def _log_prob_gradients(trainer: Trainer, indices: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the mean chosen and the mean rejected log-prob of held-out pairs."""
    split = trainer.run.eval
    assert split is not None
    batches = trainer.policy.batches(split.groups, indices)
    logps = trainer.forward(batches, split.reference).policy
    assert isinstance(logps, SequenceLogps)
    up = torch.autograd.grad(logps.chosen.mean(), trainer.parameters, retain_graph=True)
    return list(up), list(torch.autograd.grad(logps.rejected.mean(), trainer.parameters))


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    norms = (inner_product(a, a) * inner_product(b, b)).sqrt()
    return float(inner_product(a, b) / norms)


def entropies(trainer: Trainer, job: Job) -> Record:
    """Entropies of the DID and of the policy by `fastpref did-entropy`, with errors, nats."""
    return _entropies(trainer, job, PAIRS, None)


def few_entropies(trainer: Trainer, job: Job) -> Record:
    """The same with a few prompts."""
    return _entropies(trainer, job, 2, 16)


def _entropies(trainer: Trainer, job: Job, pairs: int, limit: int | None) -> Record:
    """Entropies with a number of pairs for each training prompt, and a limit of the prompts."""
    train = str(trainer.config.data.train)
    estimate = Estimate(
        policy=str(trainer.export()),
        reference=str(trainer.config.model.path),
        prompts=train,
        out=trainer.run.folder / "did-entropy",
        sampling=Sampling(SAMPLES, max_new_tokens=56, batch_size=128, engine="transformers"),
        pairs=pairs,
        held_out=str(files(Path(train).parent, job.data).held_out),
        limit=limit,
        overrides=_OVERRIDES,
    )
    result = estimate.run(Display(Console(quiet=True)))
    record: dict[str, Any] = {"step": trainer.step}
    slopes = result["slopes"]
    if slopes["prompts"]:
        record |= {"did/slope": slopes["median"], "did/share": slopes["share_nonnegative"]}
    for name in ("did", "policy"):
        summary = result[name]
        record |= {
            f"{name}/entropy": summary["entropy"],
            f"{name}/error": summary["standard_error"],
            f"{name}/samples": summary["samples"],
        }
    return record


def entropy_of(run: Outcome, name: str) -> Measurement:
    """The entropy of the DID or of the policy.

    Raises Missing if it was not estimated, or if log π' does not follow log(π/ref): the entropy of
    π' is then not that of the DID (appendix K.1).
    """
    value, error, samples = (run.last(f"{name}/{k}") for k in ("entropy", "error", "samples"))
    if name == "did" and run.last("did/share") < LEAST_SHARE:
        raise Missing(f"π' of {run.label} has slopes >= 0 for {run.last('did/share'):.0%} only")
    return Measurement(value, error, int(samples))
