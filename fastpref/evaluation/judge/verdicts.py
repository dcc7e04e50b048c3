"""Verdicts about pairs, whoever gives them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from fastpref.evaluation.judge.cache import Cache
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.template import PREFERENCES
from fastpref.utils.progress import Display


class Game(NamedTuple):
    """Verdict about a pair in one order."""

    label: str | None  # such as "A>B"; A is the answer that is shown first; None is unparsable
    text: str  # the judge's answer

    @property
    def preference(self) -> float | None:
        """Preference for the answer that is shown first."""
        return None if self.label is None else PREFERENCES[self.label]


class Judged(NamedTuple):
    """A pair and its verdict."""

    pair: Pair
    games: tuple[Game, Game]  # first the baseline's answer shown first, then the model's
    preference: float | None  # for the model's answer, in [0, 1]; None if there is no verdict

    @property
    def is_consistent(self) -> bool | None:
        """Whether both orders prefer the same answer; None if one of them has no verdict."""
        baseline_first, model_first = (game.preference for game in self.games)
        if baseline_first is None or model_first is None:
            return None
        return baseline_first == 1 - model_first


class Judge(Protocol):
    """A source of verdicts.

    positional: whether a verdict can depend on the order of the answers.
    settings: everything that decides the verdicts.
    """

    @property
    def name(self) -> str: ...

    @property
    def positional(self) -> bool: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def judge(self, pairs: list[Pair], cache: Cache, display: Display) -> list[Judged]: ...


def of_games(pair: Pair, games: tuple[Game, Game]) -> Judged:
    """Mean preference over both orders; one order alone would keep the bias for a position."""
    baseline_first, model_first = (game.preference for game in games)
    if baseline_first is None or model_first is None:
        return Judged(pair, games, None)
    return Judged(pair, games, (1 - baseline_first + model_first) / 2)


def of_preference(pair: Pair, preference: float, text: str = "") -> Judged:
    """Verdict that does not depend on the order."""
    labels = ("A>B", "B>A") if preference < 0.5 else ("B>A", "A>B")
    if preference == 0.5:
        labels = ("A=B", "A=B")
    return Judged(pair, (Game(labels[0], text), Game(labels[1], text)), preference)
