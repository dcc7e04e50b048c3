"""The propositions of the PMO study, and its statistics of a grid."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastpref.reproduce.papers import pmo, pmo_online
from fastpref.reproduce.quantities import accuracy
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import START, Job, Outcome, Runs


def test_the_optima_are_those_of_the_propositions() -> None:
    (record,) = pmo.optima(Job("optima", 0, {}))
    assert set(record) == {"step", "optimum/simpo", *(f"optimum/{label}" for label in pmo.GRID)}
    assert all(value < 1e-8 for name, value in record.items() if name != "step")


def grid(**shares: float) -> Runs:
    """Runs with a share of 100 pairs right, one of the weak and the next objective."""
    pairs = {"pairs/rejected": [0.0] * 100}
    outcomes = [Outcome(START, 0, [], pairs | {"pairs/chosen": [0.0] * 100})]
    for label in pmo.GRID:
        right = round(100 * shares.get(label.replace(" ", "_"), 0.3))
        chosen = [1.0] * right + [-1.0] * (100 - right)
        outcomes.append(Outcome(label, 0, [], pairs | {"pairs/chosen": chosen}))
    return Runs({outcome.label: outcome for outcome in outcomes})


def test_the_lead_of_a_run_is_over_the_next_one() -> None:
    runs = grid(**{pmo.WEAK.replace(" ", "_"): 0.5, pmo.FREE.replace(" ", "_"): 0.4})
    assert pmo._lead(accuracy, 1)(runs).value == pytest.approx(0.1)
    assert pmo._lead(accuracy, -1)(runs).value == pytest.approx(-0.2)


def test_the_target_of_soft_labels_is_p_for_pmo_and_far_away_for_dpo() -> None:
    """The margins at the optima: logit p for alpha + beta = 1, ten times that for beta 0.1."""
    logit = math.log(0.8 / 0.2)
    scale = {label: 1 / (loss["alpha"] + loss["beta"]) for label, loss in pmo.GRID.items()}
    assert [scale[label] * logit for label in (*pmo.ANCHORED, pmo.FREE)] == [
        pytest.approx(logit)
    ] * 3
    assert scale[pmo.WEAK] == pytest.approx(10)


def test_a_pretrained_model_runs_the_few_jobs_that_fit() -> None:
    size = SIZES["cores"].starting_from(Path("model"))
    assert [job.label for job in pmo.jobs(0, size)] == [*pmo.FEW, "optima", pmo_online.OPTIMA]
