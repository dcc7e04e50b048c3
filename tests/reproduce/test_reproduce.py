"""Reproductions: claims are arithmetic on runs, and a study leaves numbers, a page, a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastpref import reproduce
from fastpref.data.synthetic import graded
from fastpref.reproduce import data, results, runner
from fastpref.reproduce.papers import did
from fastpref.reproduce.study import Claim, Outcome, load, spread, verdict
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

ROWS = graded.groups(300, seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, 2.0], "reproduced"), ([1.0, -1.0], "in 1 of 2 seeds"), ([0.0], "not reproduced")],
)
def test_a_verdict_counts_the_seeds_in_which_a_claim_holds(
    values: list[float], message: str
) -> None:
    claim = Claim("", "", "", lambda runs: 0.0, above=0)
    assert verdict(claim, values) == message
    assert claim.bound == "above 0"


def test_a_claim_may_have_two_bounds_and_no_number_holds_none() -> None:
    claim = Claim("", "", "", lambda runs: 0.0, above=0.5, below=0.8)
    assert [claim.holds(x) for x in (0.4, 0.6, 0.9, float("nan"))] == [False, True, False, False]
    assert claim.bound == "above 0.5 and below 0.8"


def test_a_spread_is_the_mean_and_the_range() -> None:
    assert spread([1.0, -2.0, 4.0], ".1f") == "1.0 (−2.0 to 4.0)"
    assert spread([1.0], ".2f") == "1.00"


def test_one_in_a_hundred_of_a_label_is_left() -> None:
    rows = data.rare(ROWS, label=True)
    assert sum(row["label"] for row in rows) == 3
    assert sum(not row["label"] for row in rows) == 300


@pytest.mark.parametrize("kind", ["semantic", *data.KINDS])
def test_held_out_rows_share_no_prompt_with_those_trained_on(kind: str, tmp_path: Path) -> None:
    data.write(tmp_path, kind, 0, ROWS)
    train, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in data.files(tmp_path, kind)
    )
    assert train and held_out
    if kind == "semantic":  # its prompts are few; the words compared are what must differ
        contrasts = [{tuple(sorted(row["words"])) for row in rows} for rows in (train, held_out)]
        assert not contrasts[0] & contrasts[1]
    else:
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_files_of_users_are_groups_with_room_for_a_response(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert data.read(path, 128, 100) == ROWS[:100]
    with pytest.raises(
        UserError, match=r"--data: .*expected 50 groups .* at most 2 characters, got 0"
    ):
        data.read(path, 1, 100)
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="expected JSON lines with prompt, completions and scores"):
        data.read(path, 128, 100)


@pytest.mark.parametrize("name", reproduce.NAMES)
def test_the_claims_and_columns_of_a_study_speak_of_its_runs(name: str) -> None:
    """With made-up numbers, quick and in full: no claim or column lacks its metric."""
    study, chance = load(name), np.random.default_rng(0)
    names = {*study.metrics, *_measured()}
    for quick in (True, False):
        outcomes = [
            Outcome(job.label, seed, [
                {"step": step, **{metric: float(chance.normal()) for metric in names}}
                for step in range(0, 12, 2)
            ])
            for seed in range(2)
            for job in study.jobs(seed, quick)
        ]  # fmt: skip
        assert len({(run.label, run.seed) for run in outcomes}) == len(outcomes)
        claims = results.claims(study, outcomes)
        assert all(np.isfinite(claim["values"]).all() for claim in claims)
        rows = results.table(study, outcomes)
        assert all(len(row) > 1 for row in rows)
        assert isinstance(study.draw(results.by_seed(outcomes)), Figure)


def _measured() -> set[str]:
    """Metrics of jobs in addition to those of training."""
    from fastpref.reproduce import sample_scores

    bands = {f"bands/{k}_{side}" for k in ("center", "width")
             for side in ("head", "full", "correlation")}  # fmt: skip
    scores = {sample_scores.WIN_RATE, sample_scores.MALFORMED, sample_scores.TOKENS}
    return {*scores, did.TARGET, did.DID, "did/entropy", *bands}


def test_divergences_are_those_of_probabilities() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    m = (p + q) / 2
    expected = sum(torch.xlogy(x, x / m).sum() for x in (p, q)) / 2
    smooth = [(x + 1e-12).log().log_softmax(0) for x in (p, q)]
    assert did.js(*smooth) == pytest.approx(expected.item(), abs=1e-6)
    assert did.js(smooth[0], smooth[0]) == pytest.approx(0, abs=1e-12)


def test_in_a_table_of_logits_dpo_finds_the_target_and_log_pi_the_did() -> None:
    for label, metric in (("dpo", did.TARGET), ("r = β log π", did.DID)):
        job = next(job for job in did.jobs(0, True) if job.label == did.ebm(label))
        lines = did.world(job)
        assert lines[0][metric] > 1e-2
        assert lines[-1][metric] < 1e-6


def test_a_study_leaves_its_numbers_a_page_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, display: Display
) -> None:
    """One table of logits and one training, in another process."""
    labels = [did.ebm("dpo"), "dpo"]
    study = replace(
        load("did"),
        jobs=lambda seed, quick: [job for job in did.jobs(seed, quick) if job.label in labels],
        claims=[claim for claim in did.CLAIMS if claim.statement.startswith("DPO lowers")],
        draw=lambda seeds: Figure(),
    )
    monkeypatch.setattr(reproduce, "load", lambda name: study)
    monkeypatch.setitem(runner.SIZES, "quick", runner.Size("quick", 16, 1, 128, 60, 1, 1))
    (result,) = reproduce.run("did", display, tmp_path, "quick")
    assert json.loads((tmp_path / "did.json").read_text()) == result
    runs = json.loads((tmp_path / "did-runs.json").read_text())
    assert [run["label"] for run in runs] == labels
    change = runs[1]["records"][-2]["logps/chosen_change"]
    assert result["claims"][0]["values"][0] == pytest.approx(change, rel=1e-4)
    page = (tmp_path / "did.md").read_text()
    assert all(f"\n| {label} | " in page for label in labels)
    assert (tmp_path / "did.png").exists()


def test_what_data_does_not_allow_is_not_measured() -> None:
    """Samples of a user's groups have no known utilities."""
    study = load("stapo")
    names = [name for name in (*study.metrics, *_measured()) if not name.startswith("samples/")]
    lines = [{"step": step, **dict.fromkeys(names, 0.5)} for step in range(3)]
    outcomes = [Outcome(job.label, 0, lines) for job in study.jobs(0, False)]
    verdicts = [claim["verdict"] for claim in results.claims(study, outcomes)]
    assert verdicts.count("not measured") == 2
    result = {"claims": results.claims(study, outcomes), "table": results.table(study, outcomes)}
    assert "| – | **not measured** |" in results.page(study, result)


@pytest.mark.parametrize(
    ("name", "size", "groups", "message"),
    [
        ("ppo", "cores", None, "NAME: expected all"),
        ("pmo", "big", None, "--size: expected one of"),
        ("pmo", "cores", Path("groups.jsonl"), "--data: pmo is measured on data of its own"),
    ],
)
def test_what_there_is_not_is_refused(
    name: str, size: str, groups: Path | None, message: str, display: Display
) -> None:
    with pytest.raises(UserError, match=message):
        reproduce.run(name, display, Path("nowhere"), size, groups)
