"""The prediction of the band, against a small step of gradient descent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration.runs import forward
from fastpref.dynamics.band import band, parameter_geometry
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer

ONE_STEP_PAIRS = 48


def one_step(trainer: Trainer, data: DataSplit, nats: float = 0.01) -> dict[str, float]:
    """Compare the changes that the band predicts with those of a step of gradient descent.

    A step follows the gradient of one pair's loss, calibrated as in training, in all parameters and
    in fp64. Its length makes the larger change of a log-prob `nats`, well above the rounding of the
    model's norms, which are in fp32. Returns shares of pairs: `inside` the band by the scores of
    all parameters; `agree`: both changes have the predicted signs; `agree_inside`: the same among
    the pairs inside; `head_inside` and `head_agree`: the same with the scores of the head.
    """
    policy = trainer.policy.double()
    policy.compute_dtype = torch.float64
    objective: Any = trainer.loss  # pairwise
    parameters: list[Tensor] = [p for p in policy.parameters() if p.requires_grad]
    counts: Counter[str] = Counter()
    for index in range(ONE_STEP_PAIRS):
        trainer.calibration.discard_step()
        trainer.calibration.before_step(0)
        output = forward(trainer, data, [index], geometry=True)
        before = output.policy
        loss = objective(
            trainer.calibration.calibrate(output, True, accumulated=False), output.reference
        ).loss.sum()
        d_chosen, d_rejected = torch.autograd.grad(
            loss, (before.chosen, before.rejected), retain_graph=True
        )
        predicted, by_head = (
            band(-d_chosen, d_rejected, geometry)[-2:]
            for geometry in (parameter_geometry(before, parameters), output.geometry)
        )
        by_all, head = signs(*predicted), signs(*by_head)
        rate = nats / torch.cat(predicted).abs().max().item()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-rate)
            after = forward(trainer, data, [index]).policy
            torch._foreach_add_(parameters, gradients, alpha=rate)
        actual = signs(after.chosen - before.chosen, after.rejected - before.rejected)
        inside = by_all == (True, True)
        counts.update(
            inside=inside,
            agree=actual == by_all,
            agree_inside=inside and actual == by_all,
            head_inside=head == (True, True),
            head_agree=actual == head,
        )
    shares = {name: count / ONE_STEP_PAIRS for name, count in counts.items()}
    shares["agree_inside"] = counts["agree_inside"] / max(1, counts["inside"])
    return {"pairs": ONE_STEP_PAIRS, **shares}


def signs(dz_chosen: Tensor, dz_rejected: Tensor) -> tuple[bool, bool]:
    """Whether the chosen log-prob does not fall, and whether the rejected one does not rise."""
    return dz_chosen.item() >= 0, dz_rejected.item() <= 0
