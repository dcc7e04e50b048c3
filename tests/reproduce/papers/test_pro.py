"""The theorems of the PRO study, its data, and its quantities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastpref import losses
from fastpref.data.synthetic import graded
from fastpref.logps import SequenceLogps
from fastpref.reproduce import data
from fastpref.reproduce.papers import pro, pro_claims, pro_runs, pro_tables
from fastpref.reproduce.quantities import WIN
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import START, Job, Outcome, Runs

ONES = torch.ones(1, dtype=torch.long)


def test_the_theorems_hold_and_the_record_has_all_of_them() -> None:
    (record,) = pro_tables.theorems(Job("theorems", 3, {}))
    runs = Runs({"theorems": Outcome("theorems", 3, [record])})
    claims = [claim for claim in pro_claims.CLAIMS if claim.kind == "theorem"]
    assert len(claims) == 10
    for claim in claims:
        assert claim.holds(claim.measure(runs).value), claim.statement


def test_a_regularizer_of_the_labeled_responses_alone_leaves_their_level_open() -> None:
    """Without weight on the others, a common fall of the labeled rewards does not change eDPO."""
    reference = torch.zeros(4, dtype=torch.float64).log_softmax(0)
    centered = torch.tensor([0.5, -0.5], dtype=torch.float64)
    lower = reference - torch.tensor([3.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    for eta, changes in ((1.0, False), (0.5, True)):
        others = torch.full((2,), 0.5, dtype=torch.float64)
        values = [
            float(pro_tables.loss(reference, centered, 3.0, eta, others, z))
            for z in (reference, lower)
        ]
        assert (abs(values[1] - values[0]) > 0.01) is changes


def test_the_pro_p_of_the_library_is_that_of_the_theorem_with_a_hyper_response_at_zero() -> None:
    """Incentives of z = (−0.4, 0.9) over the reference: those of eta = 2/3 and alpha = 9/4."""
    beta = pro_tables.BETA
    rewards = torch.tensor([-0.4, 0.9], dtype=torch.float64) * beta
    objective = losses.build("pro_p", beta=beta)
    assert isinstance(objective, losses.PairwiseLoss)
    z = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-0.4, 0.9)]
    zero = torch.zeros(1, dtype=torch.float64)
    value = objective(
        SequenceLogps(*z, ONES, ONES), SequenceLogps(zero, zero, ONES, ONES)
    ).loss.sum()
    gradients = torch.cat(torch.autograd.grad(value, z))
    with_other = torch.cat([rewards, torch.zeros(1, dtype=torch.float64)])
    coins = torch.sigmoid(with_other[:2, None] - with_other) - 0.5  # slopes of K
    expected = beta * (-torch.tensor([0.125, -0.125]) + 9 / 4 / 9 * coins.sum(1))
    torch.testing.assert_close(gradients, expected)


def test_the_slopes_of_pro_s_change_their_sign_at_the_threshold() -> None:
    """Scores (1, 1, 1, 0): 0.9375, for the set of the last response alone."""
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert pro_tables.least_slope(scores, 0.95) > 1e-4
    assert pro_tables.least_slope(scores, 0.92) < -1e-4
    assert pro_tables.least_slope(scores, pro_runs.ALPHA) > 0.05


def test_two_responses_are_the_best_and_any_other_one_of_the_same_prompts() -> None:
    rows = graded.groups(300, seed=1)
    reduced = data.best_and_random(rows)
    assert [row["prompt"] for row in reduced] == [row["prompt"] for row in rows]
    ranks = []
    for row, few in zip(rows, reduced, strict=True):
        ranked = sorted(row["scores"], reverse=True)
        assert few["scores"][0] == ranked[0]
        assert few["completions"][0] == row["completions"][row["scores"].index(ranked[0])]
        ranks.append(ranked.index(few["scores"][1]))
    assert np.bincount(ranks, minlength=4).tolist()[0] == 0
    assert min(np.bincount(ranks)[1:]) > 70
    assert data.best_and_random(rows) == reduced


def jobs(size: str) -> dict[str, Job]:
    return {job.label: job for job in pro.jobs(0, SIZES[size])}


def test_groups_of_two_and_of_four_train_on_as_many_prompts_at_alpha_2_5() -> None:
    two, four = (jobs("cores")[pro_runs.scored("pro_s", count)] for count in (2, 4))
    assert two.config == four.config
    assert "alpha" not in four.config["loss"] and losses.build("pro_s").alpha == 2.5  # type: ignore[union-attr]
    assert (two.data, four.data) == ("best and random", "4 responses")


def test_rare_labels_count_a_hundredfold() -> None:
    desired, undesired = (
        jobs("cores")[pro_runs.rare(label, 17.5)].config["loss"] for label in pro_runs.RARE
    )
    assert desired == {"name": "pro_b", "beta": 0.1, "alpha": 17.5, "desirable_weight": 100.0}
    assert undesired["undesirable_weight"] == 100.0 and "desirable_weight" not in undesired


def test_single_responses_are_twice_as_many_in_a_step_as_pairs() -> None:
    sizes = {k: jobs("cores")[pro_runs.run(k)].config["training"] for k in pro_runs.METHODS}
    assert {k: v["batch_size"] for k, v in sizes.items()} == {
        "dpo": 16, "nca": 16, "pro_p": 16, "kto": 32, "pro_b": 32
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "pairs"), [("cores", 1200), ("cores, pretrained", 324)])
def test_the_rows_are_those_of_one_epoch_and_a_thousand_held_out_pairs(
    kind: str, pairs: int
) -> None:
    size = replace(SIZES["cores"], **pro.STUDY.sizes[kind])
    parts = data.groups_of(size, 0, None)
    assert len(graded.pairs(parts.train)) == pairs
    assert len(graded.pairs(parts.held_out)) == 1020


def test_the_first_evaluation_is_after_a_third_of_75_steps() -> None:
    size = replace(SIZES["cores"], **pro.STUDY.sizes["cores"])
    exported = {
        job.label: job.config["training"]["export_every"]
        for job in pro.jobs(0, size)
        if job.measure is not None
    }
    assert exported == dict.fromkeys(map(pro_runs.run, ("dpo", "pro_p", "kto", "pro_b")), 25)


def test_the_growth_of_samples_is_that_since_the_start_and_since_the_first_evaluation() -> None:
    dpo = {
        "samples/win": [0.2] * 4, "first/win": [0.5] * 4, "begin/win": [0.4] * 4,
        "samples/tokens": [30.0] * 4, "begin/tokens": [20.0] * 4,
    }  # fmt: skip
    pro_p = {"samples/win": [0.6] * 4, "first/win": [0.5] * 4, "samples/tokens": [21.0] * 4}
    labels = (pro_runs.run("dpo"), pro_runs.run("pro_p"))
    runs = Runs({k: Outcome(k, 0, [], v) for k, v in zip(labels, (dpo, pro_p), strict=True)})
    tokens = [pro_claims.TOKENS_SINCE_BEGIN(runs, label).mean() for label in labels]
    assert tokens == pytest.approx([10.0, 1.0])
    assert pro_claims.SINCE_FIRST(runs, labels[0]).mean() == pytest.approx(-0.3)


def test_the_best_of_several_runs_is_compared_with_the_best_of_others() -> None:
    wins = {"a": 0.5, "b": 0.7, "c": 0.4, "d": 0.3}
    runs = Runs({k: Outcome(k, 0, [], {"samples/win": [v] * 50}) for k, v in wins.items()})
    number = pro_claims.best_difference(("a", "b"), ("c", "d"))(runs)
    assert number.value == pytest.approx(0.3)
    assert WIN(runs, "b").mean() == pytest.approx(0.7)


def test_a_pretrained_model_runs_the_few_jobs_that_fit_and_can_be_drawn() -> None:
    size = SIZES["cores"].starting_from(Path("model"))
    labels = [job.label for job in pro.jobs(0, size)]
    assert labels == ["theorems", "dpo, β 0.1", "pro_p, β 0.1"]
    assert not any(job.scores_samples for job in pro.jobs(0, size))
    pairs = {"pairs/chosen": [-1.0, -2.0], "pairs/rejected": [-3.0, -2.0]}
    runs = Runs({label: Outcome(label, 0, [], pairs) for label in (START, *labels)})
    assert isinstance(pro.draw([runs]), Figure)
