"""Bands and pathways of batches as values for each pair, and the claims on them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpref.reproduce.papers import rc, rc_bands
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import Job, Outcome, Runs
from tests.helpers.data import write_jsonl


def test_steps_are_repeated_for_each_pair_of_their_batch(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "band/dz_chosen": 1.0, "band/dz_rejected": -1.0},
        {"step": 2, "band/dz_chosen": 1.0, "band/dz_rejected": 1.0},
        {"step": 3, "band/dz_chosen": -1.0, "band/dz_rejected": -1.0},
        {"step": 3, "eval_loss": 1.0},
        {"step": 4, "band/dz_chosen": -1.0, "band/dz_rejected": 1.0},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    trainer: Any = SimpleNamespace(run=SimpleNamespace(folder=tmp_path))
    values = rc_bands.steps(trainer, Job("x", 0, {}))
    n = rc_bands.PAIRS
    assert values["steps/inside"] == [1.0] * n + [0.0] * 3 * n
    assert values["steps/both_up"] == [0.0] * n + [1.0] * n + [0.0] * 2 * n
    assert values["steps/both_down"] == [0.0] * 2 * n + [1.0] * n + [0.0] * n
    assert set(values["steps/cluster"]) == {0.0}


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [((0, 2), (0, 2), 1.0), ((0, 2), (1, 3), 1 / 3), ((0, 1), (2, 3), 0.0), ((0, 4), (1, 2), 0.25)],
)
def test_the_overlap_is_intersection_over_union(a, b, overlap) -> None:
    assert rc_bands._overlap(a, b) == pytest.approx(overlap)
    assert rc_bands._overlap(b, a) == pytest.approx(overlap)


def test_a_full_study_has_power_in_its_sample_sizes() -> None:
    size = SIZES["cores"]
    cores = rc.STUDY.sizes["cores"]
    pairs = cores["train"] * cores["per_prompt"]
    assert pairs >= 1000 and cores["held_out"] * cores["per_prompt"] >= 1000
    labels = {job.label for job in rc.jobs(0, size)}
    assert len(labels) == 2 * len(rc.OBJECTIVES) + len(rc.MOMENTA)
    momenta = [job for job in rc.jobs(0, size) if "steps" in job.label]
    assert all(job.config["training"]["steps"] >= 2000 for job in momenta)


def test_the_number_of_a_claim_is_that_of_its_runs() -> None:
    """CPO lifts both before calibration, and is inside with it; DPO's chosen fall by 2 nats."""

    def outcome(label: str, inside: float, up: float, chosen: float) -> Outcome:
        count = 8
        return Outcome(
            label, 0, [],
            {
                "steps/inside": [inside] * count,
                "steps/both_up": [up] * count,
                "pairs/chosen": [chosen] * count,
                "pairs/rejected": [0.0] * count,
            },
        )  # fmt: skip

    runs = Runs(
        start=outcome("start", 0, 0, -10.0),
        cpo=outcome("cpo", 0.25, 0.75, -9.0),
        **{"cpo, RC": outcome("cpo, RC", 0.75, 0.0, -9.5)},
        **{name: outcome(name, 1, 0, -12.0 - k) for k, name in enumerate(rc.ENTANGLED)},
    )
    by_statement = {claim.statement: claim for claim in rc.CLAIMS}

    def number(beginning: str) -> float:
        (claim,) = (c for s, c in by_statement.items() if s.startswith(beginning))
        assert claim.value is not None
        value = claim.value(runs)
        return value if isinstance(value, float) else value.value

    assert number("CPO drifts above") == 0.75
    assert number("and brings CPO") == 0.5
    assert number("Uncalibrated DPO") == -2.0
    assert math.isclose(number("and CPO suppresses"), 0.0)
