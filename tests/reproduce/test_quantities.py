"""Numbers from values by example, with their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastpref.metrics import preference
from fastpref.reproduce import quantities
from fastpref.reproduce.claims import Missing
from fastpref.reproduce.quantities import (
    accuracy,
    array,
    chosen_change,
    contrast,
    difference,
    kl,
    level,
    mean_of,
    pci,
    reward_accuracy,
    statistic,
)
from fastpref.reproduce.study import START, Outcome, Runs


def run(label: str, **arrays: list[float]) -> Outcome:
    return Outcome(
        label, 0, [], {name.replace("_", "/"): values for name, values in arrays.items()}
    )


def runs_of(*outcomes: Outcome) -> Runs:
    return Runs({outcome.label: outcome for outcome in outcomes})


RUNS = runs_of(
    run(START, pairs_chosen=[-1.0, -1.0, -1.0, -1.0], pairs_rejected=[-1.0, -3.0, -1.0, -1.0],
        pairs_p=[0.5, 0.9, 0.98, 0.6], pairs_cluster=[0, 0, 1, 1]),
    run("a", pairs_chosen=[0.0, -2.0, -1.0, 3.0], pairs_rejected=[-1.0, -3.0, 1.0, 0.0]),
    run("b", pairs_chosen=[-1.0, -1.0, -1.0, -1.0], pairs_rejected=[0.0, 0.0, -2.0, 0.0]),
)  # fmt: skip


def test_accuracies_count_margins_and_their_growth() -> None:
    assert accuracy(RUNS, "a").tolist() == [1.0, 1.0, 0.0, 1.0]
    assert accuracy(RUNS, START).tolist() == [0.5, 1.0, 0.5, 0.5]
    assert reward_accuracy(RUNS, "a").tolist() == [1.0, 0.0, 0.0, 1.0]
    assert chosen_change(RUNS, "a").tolist() == [1.0, -1.0, 0.0, 4.0]


def test_kl_and_pci_are_those_of_the_trainer() -> None:
    margin = torch.tensor([1.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    p = torch.tensor([0.5, 0.9, 0.98, 0.6], dtype=torch.float64)
    expected = preference.preferences(margin, p)
    np.testing.assert_allclose(kl(RUNS, "a"), expected["mean_kl"], rtol=1e-12)
    np.testing.assert_allclose(pci(RUNS, "a"), expected["pci"], rtol=1e-12)


def test_a_run_with_pairs_of_its_own_has_their_probabilities() -> None:
    other = run("c", pairs_chosen=[0.0], pairs_rejected=[0.0], pairs_p=[1.0])
    assert kl(runs_of(RUNS[START], other), "c").tolist() == pytest.approx([math.log(2)])


def test_the_error_of_a_mean_is_that_of_independent_clusters() -> None:
    # Cluster sums of the accuracies 1, 1, 0, 1 around their mean 3/4 are 1/2 and −1/2.
    number = mean_of(accuracy, "a")(RUNS)
    assert number == (0.75, pytest.approx(math.sqrt(2 * (0.25 + 0.25)) / 4), 4, 1)


def test_without_clusters_an_accuracy_has_the_binomial_error() -> None:
    values = [1.0] * 30 + [0.0] * 70
    number = mean_of(array("samples/win"), "a")(runs_of(run("a", samples_win=values)))
    assert number.value == pytest.approx(0.3)
    assert number.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert number.n == 100


def test_a_difference_of_runs_is_paired() -> None:
    same = runs_of(RUNS[START], RUNS["a"], Outcome("twin", 0, [], RUNS["a"].arrays))
    assert difference(kl, "a", "twin")(same) == (0.0, 0.0, 4, 1)
    number = difference(accuracy, "a", "b")(RUNS)
    # 1, 1, −1, 1 in the clusters (2, 0), less the mean 1/2 a pair: (1, −1).
    assert number == (0.5, pytest.approx(math.sqrt(2 * 2) / 4), 4, 1)


def test_a_contrast_weighs_runs() -> None:
    number = contrast(accuracy, {"a": 1.0, "b": -0.5, START: -0.5})(RUNS)
    assert number.value == pytest.approx(0.75 - 0.5 * 0.25 - 0.5 * (1 + 3 / 2) / 4)


def test_a_bootstrap_has_the_error_of_a_mean() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 2.0, size=2000).tolist()
    runs = runs_of(run("a", samples_win=values))
    number = statistic(lambda table: float(table[0, 0]), (array("samples/win"),), ("a",))(runs)
    exact = mean_of(array("samples/win"), "a")(runs)
    assert number.value == pytest.approx(exact.value)
    assert number.standard_error == pytest.approx(exact.standard_error, rel=0.1)


def test_a_statistic_sees_quantities_by_run() -> None:
    largest = statistic(lambda table: float(table[1].max()), (kl, accuracy), ("a", "b"))
    assert largest(RUNS).value == 0.75
    assert level(accuracy)(RUNS, "b") == 0.25


def test_runs_without_a_number_say_so() -> None:
    with pytest.raises(Missing, match="a has no samples/win"):
        mean_of(quantities.WIN, "a")(RUNS)
    with pytest.raises(Missing, match="no run c"):
        difference(kl, "c", "a")(RUNS)
