"""The band of all parameters of a small model against one step of plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.config import Config
from fastpref.data.collate import collate
from fastpref.dynamics.band import band, parameter_geometry
from fastpref.dynamics.reward_calibration import calibrated
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl

# LayerNorm, unlike RMSNorm, is in fp64 where its inputs are: one step's change is above rounding.
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
RATE = 1e-8


@pytest.mark.parametrize("name", ["dpo", "ipo", "cpo"])
@pytest.mark.parametrize("balanced", [False, True], ids=["as it is", "calibrated"])
def test_one_step_goes_where_the_band_says(
    make_config: Callable[..., Config], display: Display, tmp_path: Path, name: str, balanced: bool
) -> None:
    """Both first-order changes, and so their signs inside the band and outside, pair by pair.

    Calibrated by the pair's own factor, the ratio of its incentives is that of its norms
    (Proposition 3.4), and a pair with positive incentives is inside its band.
    """
    data = write_jsonl(tmp_path / "d.jsonl", rows(24))
    config = make_config(
        loss=name, model={"init": "random", "config": NEOX, "dtype": "float64"},
        training__steps=6, training__batch_size=8, optim__lr=1e-4, data__train=str(data),
    )  # fmt: skip
    trainer = Trainer(config, display)
    trainer.loop([])  # away from the reference, where incentives are equal
    parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    inside = 0
    for index in range(16):
        seen = _see(trainer, index)
        policy: Any = seen.policy
        geometry = parameter_geometry(policy, parameters)
        d_w, d_l = losses.incentives(trainer.loss, policy, seen.reference)
        assert (d_w > 0).all() and (d_l > 0).all()
        factor = torch.ones_like(d_w)
        if balanced:
            ratio = geometry.rejected_norm / geometry.chosen_norm
            factor = (ratio * d_l / d_w).sqrt()
        predicted = band(d_w * factor, d_l / factor, geometry)
        if balanced:
            torch.testing.assert_close(predicted.log_r, predicted.log_r_star, rtol=0, atol=1e-9)
            assert predicted.inside.all()
        loss = trainer.loss(calibrated(policy, factor), seen.reference).loss.sum()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
            after: Any = _see(trainer, index).policy
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += RATE * gradient
        for side, dz in (("chosen", predicted.dz_chosen), ("rejected", predicted.dz_rejected)):
            change = (getattr(after, side) - getattr(policy, side)).detach() / RATE
            largest = torch.maximum(predicted.dz_chosen.abs(), predicted.dz_rejected.abs())
            assert (change - dz).abs() <= 1e-3 * largest
        inside += bool(predicted.inside)
    if name != "cpo" and not balanced:
        assert inside > 0  # signs that differ are among those compared


def _see(trainer: Trainer, index: int) -> Any:
    dataset = trainer.run.train.groups
    return trainer.forward([collate([dataset[index]])], trainer.run.train.reference)
