"""The on-policy runs of the PMO study: they learn from samples, and reach the exact optima."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastpref.config import Config
from fastpref.reproduce.papers import pmo, pmo_online
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import Job
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


@pytest.fixture
def trainer(make_config: Callable[..., Config], display: Display, tmp_path: Path) -> Trainer:
    pairs = [{**row, "p": 0.9} for row in rows(8)]
    config = make_config(
        loss="simpo",
        data__train=str(write_jsonl(tmp_path / "d.jsonl", pairs)),
        training__steps=4,
        training__batch_size=4,
        training__batch_invariant=False,
        optim__lr=1e-2,
    )
    return Trainer(config, display)


def test_the_reward_model_fits_the_probabilities(trainer: Trainer) -> None:
    before = {name: p.clone() for name, p in trainer.policy.named_parameters()}
    trainer.steps = 30
    model = pmo_online.train_reward_model(trainer)
    (batch,) = trainer.policy.batches(trainer.run.train.groups, range(8))
    chosen, rejected = model(batch).detach().chunk(2)
    assert torch.sigmoid(chosen - rejected).mean().item() == pytest.approx(0.9, abs=0.1)
    group = trainer.run.train.groups[3]
    alone = model.of([group.prompt.tolist()], [group.responses[0].tolist()])
    torch.testing.assert_close(alone[0], chosen[3], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())


@pytest.mark.parametrize("label", pmo_online.LABELS)
def test_a_run_takes_as_many_steps_as_the_offline_ones(
    trainer: Trainer, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmo_online, "MAX_NEW_TOKENS", 4)
    records = pmo_online.learn(trainer, Job(label, 0, {}))
    assert [record["step"] for record in records] == ([0, 2] if label == "ppo" else [0, 1, 2, 3])
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(records[-1]["kl"]) > 1e-6
    state = trainer.optimizer.state
    assert {int(entry["step"]) for entry in state.values()} == {4}


def test_the_study_compares_both_with_the_offline_objectives() -> None:
    jobs = {job.label: job for job in pmo.jobs(0, SIZES["cores"])}
    assert all(jobs[label].learn is pmo_online.learn for label in pmo_online.LABELS)
    tested = [claim for claim in pmo.CLAIMS if claim.protocol == pmo.ON_POLICY]
    assert len(tested) == 4
