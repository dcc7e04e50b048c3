"""Claims of a paper, the numbers measured for them, and the rule that turns both into a verdict.

A claim states a bound before any run: the least effect that counts, on one side of `null`, the
value without an effect. It is judged only if the measurement could have decided either way:

    seeds >= 3,  n >= 1,000 pairs or samples per seed,  |bound − null| >= 2 standard errors

A value beyond such a bound is at least two standard errors away from no effect. Theorems are
checked to the accuracy of the arithmetic and count as no finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SEEDS = 3
EXAMPLES = 1000  # held-out pairs, samples or worlds of a seed
ERRORS = 2.0  # standard errors in the least effect
HOLDS, FAILS, UNTESTED, THEOREM = "holds", "does not hold", "not tested", "theorem"


class Missing(LookupError):
    """A run lacks a number, because its data does not allow it."""


class Measurement(NamedTuple):
    """A number, its standard error, and the size of its sample.

    `value` of one seed has the standard error over its `n` examples, with one seed; `pooled` makes
    one of several seeds, for which `n` is that of the smallest.
    """

    value: float
    standard_error: float
    n: int
    seeds: int = 1


class Verdict(NamedTuple):
    """`holds`, `does not hold`, `not tested` with a reason, or `theorem`."""

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and a number of a seed's runs that must be above or below a bound.

    kind: a theorem is checked, but is no finding. untested: the reason why no run of this library
    can decide the claim; it then needs no value. A value that is a plain float has no sample size,
    so only a theorem may have one.
    """

    statement: str
    source: str  # section, table or figure of the paper
    number: str = ""  # description of the value, with its unit
    value: Callable[[Any], Measurement | float] | None = None  # of the runs of a seed
    above: float | None = None
    below: float | None = None
    null: float = 0.0  # the value without an effect
    kind: Literal["finding", "theorem"] = "finding"
    protocol: str = ""  # what was trained and measured on what, in one sentence
    untested: str = ""

    def __post_init__(self) -> None:
        bounded = self.above is not None or self.below is not None
        if bool(self.untested) == (self.value is not None and bounded):
            raise ValueError(
                f"{self.statement}: expected a value and a bound, or a reason in `untested`"
            )

    def holds(self, value: float) -> bool:
        return (self.above is None or value > self.above) and (
            self.below is None or value < self.below
        )

    @property
    def bound(self) -> str:
        sides = (("above", self.above), ("below", self.below))
        return " and ".join(f"{word} {side:g}" for word, side in sides if side is not None)

    @property
    def effect(self) -> float:
        """The least effect: distance of the bound from `null`, or half of an interval's width."""
        if self.above is not None and self.below is not None:
            return (self.below - self.above) / 2
        sides = [abs(side - self.null) for side in (self.above, self.below) if side is not None]
        return sides[0] if sides else 0.0

    def measure(self, runs: Any) -> Measurement:
        """The number of one seed. Raises Missing if the runs lack it."""
        if self.value is None:
            raise Missing(self.untested)
        result = self.value(runs)
        if isinstance(result, Measurement):
            return result
        return Measurement(float(result), 0.0, 0)


def pooled(seeds: Sequence[Measurement]) -> Measurement:
    """The mean over seeds, and its standard error.

    The error is the larger one of two estimates: from the spread between seeds, which is rough for
    three of them, and from the errors within seeds, which leaves out the training.
    """
    values = [seed.value for seed in seeds]
    count = len(values)
    within = math.sqrt(math.fsum(seed.standard_error**2 for seed in seeds)) / count
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    between = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
    n = min(seed.n for seed in seeds)
    return Measurement(mean, max(within, between), n, count)


def judge(
    claim: Claim,
    seeds: Sequence[Measurement],
    quick: bool = False,
    missing: str = "no run has its number",
) -> Verdict:
    """The verdict on a claim from its number in each seed.

    quick: name the size of the run as the reason for which it decides nothing. missing: the reason
    where there is no number.
    """
    if claim.untested:
        return Verdict(UNTESTED, claim.untested)
    if not seeds:
        return Verdict(UNTESTED, missing)
    if claim.kind == "theorem":
        holds = all(claim.holds(seed.value) for seed in seeds)
        return Verdict(THEOREM if holds else FAILS)
    number = pooled(seeds)
    reason = _lack_of_power(claim, number)
    if reason:
        return Verdict(UNTESTED, "quick" if quick else reason)
    return Verdict(HOLDS if claim.holds(number.value) else FAILS)


def _lack_of_power(claim: Claim, number: Measurement) -> str:
    """The reason why a measurement cannot decide a claim; empty if it can."""
    if not (math.isfinite(number.value) and math.isfinite(number.standard_error)):
        return "its number is not finite"
    if number.seeds < SEEDS:
        return f"{number.seeds} of {SEEDS} seeds"
    if number.n < EXAMPLES:
        return f"n {number.n:,} < {EXAMPLES:,}"
    if claim.effect < ERRORS * number.standard_error:
        return f"bound < {ERRORS:g} standard errors"
    return ""
