"""Numbers of a comparison from verdicts that are written out."""

from __future__ import annotations

import pytest

from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.judge.outputs import arena, leaderboard
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.summary import Summary, summarize
from fastpref.evaluation.judge.verdicts import Game, Judged, of_games, of_preference
from fastpref.utils.errors import UserError


def judged(number: int, *labels: str | None) -> Judged:
    """Labels of the game with the baseline first, then with the model first."""
    question = Question(number + 1, "p", f"p{number}", None, None, None)
    first, second = (Game(label, "") for label in labels)
    return of_games(Pair(question, number, "model's", "base"), (first, second))


VERDICTS = [
    judged(0, "B>A", "A>B"),  # 1
    judged(1, "B>>A", "A=B"),  # 0.75
    judged(2, "A>B", "A>B"),  # 0.5, contradicting
    judged(3, "A=B", "A=B"),  # 0.5
    judged(4, "A>B", "B>>A"),  # 0
    judged(5, "A>B", None),  # no verdict
]


def test_the_preference_is_the_mean_of_both_orders() -> None:
    assert [each.preference for each in VERDICTS] == [1.0, 0.75, 0.5, 0.5, 0.0, None]
    consistent = [each.is_consistent for each in VERDICTS]
    assert consistent == [True, False, False, True, True, None]


def test_the_numbers_are_those_of_the_verdicts() -> None:
    summary = summarize(VERDICTS, positional=True)
    assert (summary.prompts, summary.pairs) == (5, 6)
    assert summary.win_rate == pytest.approx(0.55)
    # Squared deviations 0.2025 + 0.04 + 2 · 0.0025 + 0.3025 = 0.55, by 4 and 5.
    assert summary.standard_error == pytest.approx((0.55 / 4 / 5) ** 0.5)
    assert summary.discrete_win_rate == pytest.approx((1 + 1 + 0.5 + 0.5 + 0) / 5)
    assert (summary.wins, summary.ties, summary.losses, summary.unjudged) == (2, 2, 1, 1)
    assert summary.unparsable == 1
    assert summary.consistency == pytest.approx(3 / 5)
    # Shown first and preferred: once in each order of pair 2, of 0, 4 and 5; eight decide.
    assert summary.first_shown == pytest.approx(5 / 8)
    assert summary.lengths == (7.0, 4.0)


def test_one_prompt_has_no_standard_error() -> None:
    summary = summarize(VERDICTS[:1], positional=True)
    assert summary.standard_error is None and summary.length_controlled.standard_error is None
    header, row = leaderboard(summary, "m").splitlines()
    assert row.startswith("m,100.0,,1,0,0,1,100.0,community,7,") and row.endswith(",")
    assert header.startswith(",win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,")


def test_a_judge_without_positions_has_no_consistency() -> None:
    pair = VERDICTS[0].pair
    summary = summarize([of_preference(pair, 0.9)], positional=False)
    assert isinstance(summary, Summary)
    assert (summary.consistency, summary.first_shown, summary.wins) == (None, None, 1)


@pytest.mark.parametrize(
    ("preference", "scores"),
    [(1.0, ["B>A", "A>B"]), (0.5, ["A=B", "A=B"]), (0.2, ["A>B", "B>A"])],
)
def test_labels_of_a_preference(preference: float, scores: list[str]) -> None:
    line = arena(of_preference(VERDICTS[0].pair, preference), ("m", "b"), "j")
    assert [game["score"] for game in line["games"]] == scores
    assert line["category"] == "hard_prompt"


def test_no_verdict_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no pair has a verdict in both orders, 1 answers of the j"):
        summarize(VERDICTS[5:], positional=True)
