"""The tables and the gradients of the DID study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpref.config import Config
from fastpref.reproduce.claims import Missing
from fastpref.reproduce.papers import did, did_models, did_tables
from fastpref.reproduce.papers.did_tables import DID, TARGET
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import Job, Outcome, Runs
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

JOBS = {job.label: job for job in did.jobs(0, SIZES["quick"])}


@pytest.mark.parametrize("target", did_tables.TARGETS)
def test_the_ideal_rejected_distribution_is_that_of_equation_1(target: str) -> None:
    """Up to its normalizer, ref · (ref / target)^beta; and the DID is target / ref."""
    logits = torch.randn(3, 32, dtype=torch.float64)
    known = did_tables.distributions(logits, target, "the ideal")
    reference, goal = known["reference"], known[TARGET]
    ideal = (reference + did_tables.BETA * (reference - goal)).log_softmax(1)
    torch.testing.assert_close(known["rejected"], ideal)
    torch.testing.assert_close(known[DID], (goal - reference).log_softmax(1))


def test_a_reinforcing_target_is_sharper_than_the_reference_and_a_smoothing_one_flatter() -> None:
    logits = torch.randn(1, 32, dtype=torch.float64)
    entropies = {
        target: did_tables.distributions(logits, target, "the ideal")[TARGET]
        for target in did_tables.TARGETS
    }
    values = {name: -(p.exp() * p).sum().item() for name, p in entropies.items()}
    reference = logits.log_softmax(1)
    middle = -(reference.exp() * reference).sum().item()
    assert values["reinforcing"] < middle < values["smoothing"]


def test_from_samples_dpo_comes_near_the_target_and_ipo_less() -> None:
    divergences = {}
    for name in ("dpo", "ipo"):
        job = JOBS[did.world(name)]
        job = replace(job, config={**job.config, "worlds": 50, "steps": 400})
        (record,) = did_tables.train_worlds(job)
        assert len(record[f"worlds/{TARGET}"]) == 50
        divergences[name] = sum(record[f"worlds/{TARGET}"]) / 50
    assert divergences["dpo"] < 0.5 * divergences["ipo"]


def test_the_population_gives_both_theorems() -> None:
    (record,) = did_tables.exact_population(JOBS[did.EXACT])
    assert record[f"exact/dpo/{TARGET}"] < 1e-8
    assert record[f"exact/r = β log π/{DID}"] < 1e-8


def test_directions_of_dpo_pg_keep_its_theorems_and_plain_dpo_does_not(
    make_config: Callable[..., Config],
    display: Display,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(did_models, "GRADIENT_PAIRS", 4)
    data = {"train": str(tmp_path / "pairs.jsonl"), "cache": str(tmp_path / "cache")}
    trainer = Trainer(make_config(data=data | {"eval": data["train"], "max_length": 64}), display)
    job = Job("dpo", 0, {})
    record = did_models.gradients(trainer, job)
    assert record["gradients/chosen"] > 0
    assert record["gradients/rejected"] < 1e-5
    assert record["gradients/loss"] < 0
    # Without the projection, the direction of the chosen responses raises the rejected ones too.
    monkeypatch.setattr(did_models, "project_", lambda chosen, rejected: None)
    assert did_models.gradients(trainer, job)["gradients/rejected"] > 0.1


def estimated(label: str, entropy: float, share: float = 0.8) -> Outcome:
    numbers = {"entropy": entropy, "error": 0.3, "samples": 1360, "share": share}
    return Outcome(label, 0, [{"step": 1, **{f"did/{k}": v for k, v in numbers.items()}}])


def test_the_difference_of_entropies_is_that_of_the_nearest_run() -> None:
    entropies = dict(zip(did.NEAR, (10.0, 12.0, 7.0), strict=True))
    runs = Runs({label: estimated(label, value) for label, value in entropies.items()})
    number = did._entropy_difference("did")(runs)
    assert number == (3.0, pytest.approx(0.3 * 2**0.5), 1360, 1)


def test_an_entropy_of_a_model_that_is_not_the_did_is_not_used() -> None:
    with pytest.raises(Missing, match="π' of dpo has slopes >= 0 for 40% only"):
        did_models.entropy_of(estimated("dpo", 10.0, 0.4), "did")
    with pytest.raises(Missing, match="dpo has no did/entropy"):
        did_models.entropy_of(Outcome("dpo", 0, []), "did")


def test_policies_for_the_entropy_stay_near_the_reference() -> None:
    configs = {job.label: job.config for job in did.jobs(0, SIZES["cores"])}
    assert all(configs[label]["optim"]["lr"] == did.NEAR_LR for label in did.NEAR)
    assert "optim" not in configs["dpo"]


def test_a_pretrained_model_computes_no_reference_of_rows_it_does_not_train_on() -> None:
    size = SIZES["cores"].starting_from(Path("model"))
    configs = {job.label: job.config for job in did.jobs(0, size) if job.measure}
    assert list(configs) == ["dpo", "dpo_pg"]
    assert all(config["reference"] == "frozen" for config in configs.values())
