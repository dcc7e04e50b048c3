"""The rule by which a claim holds, does not hold, or is not tested."""

from __future__ import annotations

import math

import pytest

from fastpref.reproduce.claims import Claim, Measurement, judge, pooled


def claim(**options: object) -> Claim:
    defaults: dict[str, object] = {"value": lambda runs: runs["value"], "above": 0.1}
    return Claim("s", "t", "n", **(defaults | options))  # type: ignore[arg-type]


def seeds(*values: float, error: float = 0.02, n: int = 1000) -> list[Measurement]:
    return [Measurement(value, error, n) for value in values]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (seeds(0.2, 0.2, 0.2), "holds"),
        (seeds(0.05, 0.05, 0.05), "does not hold"),
        (seeds(-0.5, -0.5, -0.5), "does not hold"),
        # The mean decides, not every seed: 0.11 with an error of 0.01 · 2/√3.
        (seeds(0.09, 0.11, 0.13), "holds"),
        (seeds(0.2, 0.2), "not tested (2 of 3 seeds)"),
        (seeds(0.2, 0.2, 0.2, n=999), "not tested (n 999 < 1,000)"),
        # Within seeds: 0.1 / √3 = 0.058, and twice that is more than the bound.
        (seeds(0.2, 0.2, 0.2, error=0.1), "not tested (bound < 2 standard errors)"),
        # Between seeds: the standard deviation 0.1 / √3.
        (seeds(0.1, 0.2, 0.3), "not tested (bound < 2 standard errors)"),
        (seeds(0.2, 0.2, math.nan), "not tested (its number is not finite)"),
        ([], "not tested (no run has its number)"),
    ],
)
def test_a_verdict_needs_seeds_examples_and_power(
    measured: list[Measurement], verdict: str
) -> None:
    assert str(judge(claim(), measured)) == verdict


def test_a_bound_of_zero_is_never_judged_where_there_is_noise() -> None:
    """A number on either side of it would be a verdict by chance."""
    assert str(judge(claim(above=0.0), seeds(5.0, 5.0, 5.0, error=1e-3))) == (
        "not tested (bound < 2 standard errors)"
    )


def test_the_least_effect_is_measured_from_the_value_without_one() -> None:
    chance = claim(above=0.55, null=0.5)
    assert chance.effect == pytest.approx(0.05)
    assert judge(chance, seeds(0.6, 0.6, 0.6, error=0.04)).word == "holds"
    assert judge(chance, seeds(0.6, 0.6, 0.6, error=0.05)).word == "not tested"


def test_an_interval_needs_errors_below_a_quarter_of_its_width() -> None:
    between = claim(above=0.5, below=0.8)
    assert between.bound == "above 0.5 and below 0.8"
    assert between.effect == pytest.approx(0.15)
    assert [between.holds(x) for x in (0.4, 0.6, 0.9, math.nan)] == [False, True, False, False]
    assert judge(between, seeds(0.6, 0.6, 0.6, error=0.1)).word == "holds"
    assert judge(between, seeds(0.6, 0.6, 0.6, error=0.14)).word == "not tested"


def test_a_theorem_is_checked_in_every_seed_and_needs_no_sample() -> None:
    theorem = claim(above=None, below=1e-8, kind="theorem")
    assert str(judge(theorem, [Measurement(1e-12, 0.0, 0)])) == "theorem"
    assert str(judge(theorem, [Measurement(1e-12, 0.0, 0), Measurement(1e-3, 0.0, 0)])) == (
        "does not hold"
    )


def test_a_number_without_a_sample_size_decides_nothing() -> None:
    measured = [claim().measure({"value": 5.0}) for _ in range(3)]
    assert str(judge(claim(), measured)) == "not tested (n 0 < 1,000)"


def test_quick_runs_name_their_size_as_the_reason() -> None:
    assert str(judge(claim(), seeds(0.2), quick=True)) == "not tested (quick)"
    assert str(judge(claim(), seeds(0.2, 0.2, 0.2), quick=True)) == "holds"
    assert str(judge(claim(), [], quick=True, missing="no run a")) == "not tested (no run a)"


def test_what_no_run_can_decide_says_why() -> None:
    untested = Claim("s", "t", untested="needs a judge")
    assert str(judge(untested, [])) == "not tested (needs a judge)"


@pytest.mark.parametrize(
    "options",
    [
        {"value": None},
        {"above": None},
        {"untested": "why"},  # in addition to a value and a bound
    ],
)
def test_a_claim_has_a_bounded_value_or_a_reason(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected a value and a bound, or a reason"):
        claim(**options)


def test_seeds_are_pooled_with_the_larger_of_two_errors() -> None:
    number = pooled(seeds(1.0, 1.0, 1.0, error=0.3))
    assert number == Measurement(1.0, pytest.approx(0.3 / math.sqrt(3)), 1000, 3)
    number = pooled([Measurement(0.0, 0.1, 5), Measurement(2.0, 0.1, 7)])
    # The standard deviation of 0 and 2 is √2.
    assert number == Measurement(1.0, pytest.approx(1.0), 5, 2)
