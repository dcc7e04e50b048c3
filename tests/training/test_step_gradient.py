"""DPO-PG in the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastpref import metrics
from fastpref.config import Config, ConfigError
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

MakeConfig = Callable[..., Config]


def test_chosen_rise_and_rejected_do_not(make_config: MakeConfig, display: Display) -> None:
    """One plain step on all pairs: the statement of the theorem, measured."""
    config = make_config(update="dpo_pg", training__batch_size=12, optim__lr=1e-3)
    trainer = Trainer(config, display)
    parameters = trainer.parameters
    trainer.optimizer = torch.optim.SGD(parameters, lr=1e-3)
    before = logps(trainer)
    trainer._train_step(with_entropy=False)
    change = logps(trainer) - before
    assert change[0] > 1e-3
    assert change[1] <= 1e-4  # zero to first order, where chosen and rejected share a direction


def logps(trainer: Trainer) -> torch.Tensor:
    """Mean log-probs of the chosen and of the rejected responses, (2,)."""
    policy, (indices,) = trainer.policy, trainer.plan.step(0)
    with torch.no_grad():
        passes = policy.batches(trainer.run.train.groups, indices)
        sums = torch.stack([policy(batch).logps for batch in passes])
    return sums.mean(0)


def test_micro_batches_change_nothing(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    finals = []
    for tokens in (4096, 30):
        config = make_config(
            update="dpo_pg", model__dtype="float64", training__micro_batch_tokens=tokens,
            training__output_dir=str(tmp_path / str(tokens)),
        )  # fmt: skip
        trainer = Trainer(config, display)
        trainer.loop([])
        finals.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))
    assert (finals[0] - finals[1]).abs().max() < 1e-9


def test_the_loss_is_logged_and_falls(make_config: MakeConfig, display: Display) -> None:
    config = make_config(update="dpo_pg", training__epochs=4)
    trainer = Trainer(config, display)
    trainer.loop([])
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kto"}, "update: dpo_pg: is for pairwise objectives, and kto is pointwise"),
        ({"calibration": "rc"}, "update: dpo_pg uses no incentives to calibrate"),
    ],
)
def test_what_does_not_go_together(make_config: MakeConfig, change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(update="dpo_pg", **change)
