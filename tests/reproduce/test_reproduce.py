"""Whole studies: the runs of a seed, what they leave, and how they continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastpref import reproduce
from fastpref.data.synthetic import graded
from fastpref.reproduce import quantities, results, runner, sample_scores
from fastpref.reproduce.claims import Claim, Measurement
from fastpref.reproduce.papers import (
    did,
    did_tables,
    pmo,
    pmo_online,
    pro_runs,
    pro_tables,
    rc_bands,
    stapo_epochs,
)
from fastpref.reproduce.sizes import SIZES, Size
from fastpref.reproduce.study import START, Job, Outcome, Study, load, spread
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

WORLDS = [did.world("dpo", target) for target in did_tables.TARGETS]
TINY = Size("quick", 16, 1, 128, 12, 36, 12, 1, seeds=1, workers=1)


def test_a_spread_is_the_mean_and_the_range() -> None:
    assert spread([1.0, -2.0, 4.0], ".1f") == "1.0 (−2.0 to 4.0)"
    assert spread([1.0], ".2f") == "1.00"


@pytest.mark.parametrize("name", reproduce.NAMES)
@pytest.mark.parametrize("size", ["quick", "cores"])
def test_the_claims_and_columns_of_a_study_speak_of_its_runs(name: str, size: str) -> None:
    """With made-up numbers: no claim or column lacks its run or metric."""
    study, outcomes = load(name), made_up(load(name), SIZES[size])
    assert len({(run.label, run.seed) for run in outcomes}) == len(outcomes)
    records = results.claims(study, outcomes)
    for claim, record in zip(study.claims, records, strict=True):
        if size == "quick" and record["verdict"].startswith("not tested (no run"):
            continue  # it has fewer runs
        assert claim.untested or np.isfinite(record["values"]).all(), claim.statement
    assert all(len(row) > 1 for row in results.table(study, outcomes))
    assert isinstance(study.draw(results.by_seed(outcomes)), Figure)


def made_up(study: Study, size: Size) -> list[Outcome]:
    """Outcomes of two seeds with random numbers under every name."""
    chance = np.random.default_rng(0)
    bands = [f"bands/{k}" for k in ("overlap", "head", "all")]
    steps = [f"steps/{k}" for k in rc_bands.STEPS]
    exact = {f"exact/dpo/{did_tables.TARGET}", f"exact/r = β log π/{did_tables.DID}"}
    optima = {f"optimum/{label}" for label in (*pmo.GRID, "simpo")}
    entropies = {f"{k}/{n}" for k in ("did", "policy") for n in ("entropy", "error", "samples")}
    gradients = {f"gradients/{k}" for k in ("chosen", "rejected", "loss")}
    (pro,), (stapo,) = (of(Job("", 0, {})) for of in (pro_tables.theorems, stapo_epochs.theorems))
    theorems = {*pro, *stapo} - {"step"}
    names = {
        *study.metrics,
        *exact,
        *optima,
        *entropies,
        *gradients,
        *pmo_online.OPTIMA_METRICS,
        "did/slope",
    }
    names |= theorems
    scores = (sample_scores.WIN, sample_scores.MALFORMED, sample_scores.TOKENS)
    families = (pro_runs.FIRST, pro_runs.BEGIN, *map(stapo_epochs.epoch, (0, *stapo_epochs.EPOCHS)))
    samples = [f"{k}/{n}" for k in families for n in ("win", "malformed", "tokens", "entropy")]
    logits = [f"{stapo_epochs.logits(k)}/{n}" for k in stapo_epochs.LOGIT_EPOCHS
              for n in ("chosen", "rejected", "z")]  # fmt: skip
    arrays = ("pairs/chosen", "pairs/rejected", "pairs/entropy", *scores, *samples, *logits,
              *bands, *steps,
              f"worlds/{did_tables.TARGET}", f"worlds/{did_tables.DID}")  # fmt: skip
    outcomes = []
    for seed in range(2):
        for label in (START, *(job.label for job in study.jobs(seed, size))):
            records = [
                {
                    "step": step,
                    **{name: float(abs(chance.normal())) for name in names},
                    "did/share": 0.9,
                }
                for step in range(0, 12, 2)
            ]
            values = {name: chance.normal(size=20).tolist() for name in arrays}
            values["pairs/p"] = chance.uniform(size=20).tolist()
            outcomes.append(Outcome(label, seed, records, values))
    return outcomes


@pytest.mark.parametrize("name", reproduce.NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_the_config_of_every_job_is_valid(name: str, size: str, tmp_path: Path) -> None:
    """Among those of the full sizes, which only long runs reach."""
    study, full = load(name), SIZES[size]
    model = runner.start_model(tmp_path, full, 0)
    configs = [
        runner.config_of(
            tmp_path, full, job, runner.merged({"model": model}, study.training, job.config)
        )
        for job in study.jobs(0, full)
        if job.function is None
    ]
    assert configs


@pytest.mark.parametrize("name", ["pmo", "did", "pro", "stapo"])
def test_every_claim_names_its_protocol_and_least_effect(name: str) -> None:
    for claim in load(name).claims:
        if claim.untested:
            continue
        assert claim.protocol, claim.statement
        assert claim.kind == "theorem" or claim.effect > 0, claim.statement


@pytest.fixture
def small_study(monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two sets of tables and one training."""
    labels = (*WORLDS, "dpo")

    def jobs(seed: int, size: Size) -> list[Job]:
        few = [job for job in did.jobs(seed, SIZES["quick"]) if job.label in labels]
        training = {"steps": 4, "eval_every": None}
        return [
            replace(job, measure=None, config=job.config | {"training": training})
            if job.function is None
            else replace(job, config={**job.config, "worlds": 3, "steps": 5})
            for job in few
        ]

    claims = tuple(
        claim for claim in did.CLAIMS if claim.statement.startswith(("DPO lowers", "DPO conv"))
    )
    study = replace(load("did"), jobs=jobs, claims=claims, draw=lambda seeds: Figure(), sft_steps=4)
    monkeypatch.setattr(reproduce, "load", lambda name: study)
    monkeypatch.setitem(SIZES, "quick", TINY)
    # The workers are processes, which load the study from its module.
    monkeypatch.setattr(runner, "load", lambda name: study)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InProcess)
    return study


class InProcess:
    """A pool that works in this process."""

    def __init__(self, *arguments: Any) -> None: ...

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None: ...

    def map(self, function: Callable[[Any], Any], items: Any) -> Any:
        return map(function, items)


def test_a_study_leaves_its_numbers_a_page_and_a_picture(
    tmp_path: Path, display: Display, small_study: Study
) -> None:
    (result,) = reproduce.run("did", display, tmp_path, "quick")
    assert json.loads((tmp_path / "did.json").read_text()) == result
    runs = json.loads((tmp_path / "did-runs.json").read_text())
    assert [run["label"] for run in runs] == [START, *WORLDS, "dpo"]
    start, tables, _, trained = (run["arrays"] for run in runs)
    assert len(start["pairs/cluster"]) == len(trained["pairs/chosen"]) == 12
    assert len(tables[f"worlds/{did_tables.TARGET}"]) == 3
    (converges, lowers) = result["claims"]
    change = np.mean(trained["pairs/chosen"]) - np.mean(start["pairs/chosen"])
    assert lowers["value"] == pytest.approx(change, rel=1e-4)
    assert lowers["standard_error"] > 0
    assert (converges["n"], lowers["n"]) == (3, 12)
    assert lowers["verdict"] == converges["verdict"] == "not tested (quick)"
    page = (tmp_path / "did.md").read_text()
    assert all(f"\n| {label} | " in page for label in (START, *WORLDS, "dpo"))
    assert "| **not tested (quick)** |" in page
    assert (tmp_path / "did.png").exists()


def test_the_log_probs_are_those_of_the_exported_model(
    tmp_path: Path, display: Display, small_study: Study
) -> None:
    """The start model, scored by `fastpref eval` on the same file."""
    from fastpref.evaluation.evaluate import evaluate

    reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)
    seed = tmp_path / "did" / "seed-0"
    start = json.loads((seed / START / "outcome.json").read_text())["arrays"]
    held_out = str(seed / "data" / "pairs-held-out.jsonl")
    options = {"cache": str(tmp_path / "cache")}
    metrics = evaluate(
        str(seed / START / "model"), held_out, display, options=options, device="cpu"
    )["metrics"]
    for side in ("chosen", "rejected"):
        expected = metrics[f"logps/{side}"]["value"]
        assert np.mean(start[f"pairs/{side}"]) == pytest.approx(expected, rel=1e-5)


def test_a_second_call_continues_with_the_runs_that_are_missing(
    tmp_path: Path, display: Display, small_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)
    seed = tmp_path / "did" / "seed-0"
    unfinished = seed / "dpo" / "outcome.json"
    unfinished.unlink()
    finished = {path: path.stat().st_mtime_ns for path in seed.glob("*/outcome.json")}
    assert len(finished) == 3
    (second,) = reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)
    assert unfinished.exists()
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert first["claims"] == second["claims"]
    for other in (replace(TINY, hidden=32), replace(TINY, held_out=13)):
        monkeypatch.setitem(SIZES, "quick", other)
        with pytest.raises(UserError, match=r"--runs: .*start is a run with other settings; choo"):
            reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)


def test_runs_on_other_data_are_not_continued(
    tmp_path: Path, display: Display, small_study: Study
) -> None:
    reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)
    path = tmp_path / "groups.jsonl"
    groups = graded.groups(60, seed=7)
    path.write_text("".join(json.dumps(row) + "\n" for row in groups))
    with pytest.raises(UserError, match=r"--runs: .*start is a run with other settings; choose"):
        reproduce.run("did", display, tmp_path / "out", "quick", path, keep_runs=tmp_path)


def test_more_seeds_continue_a_run_with_fewer(
    tmp_path: Path, display: Display, small_study: Study
) -> None:
    reproduce.run("did", display, tmp_path / "out", "quick", keep_runs=tmp_path)
    (result,) = reproduce.run(
        "did", display, tmp_path / "out", "quick", keep_runs=tmp_path, seeds=2
    )
    assert [len(claim["values"]) for claim in result["claims"]] == [2, 2]
    assert result["command"] == "fastpref reproduce did --size quick --seeds 2"


def test_a_pretrained_model_is_the_start(
    tmp_path: Path, display: Display, small_study: Study, tiny_llama: str
) -> None:
    (result,) = reproduce.run(
        "did", display, tmp_path / "out", "quick", keep_runs=tmp_path, model=Path(tiny_llama)
    )
    assert result["model"] == "llama"
    seed = tmp_path / "did" / "seed-0"
    assert not (seed / START / "model").exists()
    config = (seed / "dpo" / "config.yaml").read_text()
    assert f"path: {tiny_llama}" in config and "lr: 2.0e-05" in config


def test_lists_of_a_measurement_are_arrays() -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 0.123456}, {"samples/win": [0.0, 1.0]}]
    outcome = runner._outcome(Job("a", 0, {}), lines)
    assert outcome.records == [{"step": 1, "loss": 0.12346}]
    assert outcome.arrays == {"samples/win": [0.0, 1.0]}


def test_what_a_run_lacks_is_not_tested_and_says_what() -> None:
    """Samples of a user's groups have no known utilities."""
    study = load("stapo")
    outcomes = made_up(study, SIZES["cores"])
    lacking = [
        replace(outcome, arrays={k: v for k, v in outcome.arrays.items() if "epoch" not in k})
        for outcome in outcomes
    ]
    records = results.claims(study, lacking)
    verdicts = [record["verdict"] for record in records]
    assert "not tested (stapo has no epoch 1/win)" in verdicts
    result = {"claims": records, "table": results.table(study, lacking)}
    assert "| **not tested (stapo has no epoch 1/win)** |" in results.page(study, result)


def test_a_verdict_is_shown_with_its_sample_its_error_and_its_bound() -> None:
    claim = Claim(
        "A beats B", "Table 1", "accuracy, A − B", lambda runs: Measurement(0.0512, 0.004, 1020),
        above=0.02, protocol="on pairs",
    )  # fmt: skip
    study = replace(load("did"), claims=(claim,))
    outcomes = [Outcome("a", seed, []) for seed in range(3)]
    (record,) = results.claims(study, outcomes)
    row = results.verdicts({"claims": [record]}).splitlines()[-1]
    assert row == (
        "| A beats B (Table 1) | on pairs | accuracy, A − B | 1,020 | 0.0512 ± 0.0023 | "
        "above 0.02 | **holds** |"
    )


def test_claims_about_samples_have_enough_of_them() -> None:
    assert quantities.WIN.family == "samples"
    assert sample_scores.score_samples.__defaults__ == (1000,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo", {}, "NAME: expected all"),
        ("pmo", {"size": "big"}, "--size: expected one of"),
        ("pmo", {"data": Path("g.jsonl")}, "--data: pmo is measured on data of its own"),
        (
            "pmo",
            {"model": Path("none")},
            "--model: none is no Hugging Face model: it has no config.json",
        ),
        ("pmo", {"seeds": 0}, "--seeds: expected a number >= 1, got 0"),
    ],
)
def test_what_there_is_not_is_refused(
    name: str, options: dict[str, Any], message: str, display: Display
) -> None:
    with pytest.raises(UserError, match=message):
        reproduce.run(name, display, Path("nowhere"), **options)
