"""Numbers of a comparison: win rates with standard errors, ties, and the bias for a position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from fastpref.evaluation.judge.length_control import LengthControl, length_controlled
from fastpref.evaluation.judge.verdicts import Judged
from fastpref.utils.errors import UserError


@dataclass(frozen=True)
class Summary:
    """Results for the model against the baseline; rates are shares in [0, 1].

    win_rate: mean preference, over the pairs of a prompt and then over prompts.
    standard_error: sample standard deviation over prompts by √prompts; None for one prompt.
    discrete_win_rate: the same with preferences above ½ as 1 and below as 0.
    wins, losses, ties: pairs; a pair whose orders contradict each other is a tie.
    identical: ties of equal answers, which were not asked about.
    unjudged: pairs without a verdict in one of the orders; no other number has them.
    unparsable: answers of the judge without a clear verdict.
    consistency: share of the pairs asked in both orders whose orders agree; None if there is none.
    first_shown: share of verdicts for the answer shown first, of those for one of the two.
    lengths: mean characters of the model's and the baseline's answers.
    """

    prompts: int
    pairs: int
    win_rate: float
    standard_error: float | None
    discrete_win_rate: float
    length_controlled: LengthControl
    wins: int
    losses: int
    ties: int
    identical: int
    unjudged: int
    unparsable: int
    consistency: float | None
    first_shown: float | None
    lengths: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "length_controlled": self.length_controlled._asdict()}


def summarize(judged: list[Judged], positional: bool) -> Summary:
    """Compute all numbers. positional: the judge was asked in both orders.

    Raises UserError if no pair has a verdict.
    """
    games = [game for each in judged if not each.pair.is_identical for game in each.games]
    unparsable = sum(game.label is None for game in games)
    complete = [each for each in judged if each.preference is not None]
    if not complete:
        raise UserError(
            f"no pair has a verdict in both orders, {unparsable:,} answers of the judge have none; "
            "see answers.jsonl, and check --template and --max-tokens"
        )
    preferences = np.array([each.preference for each in complete], dtype=np.float64)
    numbers = [each.pair.prompt_number for each in complete]
    distinct, prompts = np.unique(numbers, return_inverse=True)
    lengths_a = np.array([len(each.pair.a) for each in complete], dtype=np.float64)
    lengths_b = np.array([len(each.pair.b) for each in complete], dtype=np.float64)
    difficulties = [each.pair.question.difficulty for each in complete]
    means = _means(preferences, prompts)
    asked = [each for each in complete if not each.pair.is_identical] if positional else []
    decided = [game.preference for game in games if game.preference in (0.0, 1.0)]
    return Summary(
        prompts=len(distinct),
        pairs=len(judged),
        win_rate=float(means.mean()),
        standard_error=_standard_error(means),
        discrete_win_rate=float(_means((np.sign(preferences - 0.5) + 1) / 2, prompts).mean()),
        length_controlled=length_controlled(
            preferences,
            lengths_a - lengths_b,
            prompts,
            None if None in difficulties else np.array(difficulties, dtype=np.float64),
        ),
        wins=int((preferences > 0.5).sum()),
        losses=int((preferences < 0.5).sum()),
        ties=int((preferences == 0.5).sum()),
        identical=sum(each.pair.is_identical for each in judged),
        unjudged=len(judged) - len(complete),
        unparsable=unparsable,
        consistency=sum(bool(each.is_consistent) for each in asked) / len(asked) if asked else None,
        first_shown=sum(decided) / len(decided) if positional and decided else None,
        lengths=(float(lengths_a.mean()), float(lengths_b.mean())),
    )


def table(summary: Summary, model: str, baseline: str) -> Table:
    """Numbers for a terminal."""
    title = f"{model} against {baseline}, {summary.prompts:,} prompts"
    table = Table("", title=title, title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    control = summary.length_controlled
    table.add_row("win rate", _percent(summary.win_rate), _percent(summary.standard_error))
    table.add_row(
        "length-controlled win rate", _percent(control.win_rate), _percent(control.standard_error)
    )
    table.add_row(
        "wins / ties / losses", f"{summary.wins:,} / {summary.ties:,} / {summary.losses:,}", ""
    )
    if summary.unjudged or summary.unparsable:
        table.add_row("pairs without a verdict", f"{summary.unjudged:,}", "")
        table.add_row("answers without a verdict", f"{summary.unparsable:,}", "")
    if summary.consistency is not None:
        table.add_row("same verdict in both orders", _percent(summary.consistency), "")
        table.add_row("verdicts for the first shown", _percent(summary.first_shown), "")
    table.add_row("mean characters", " / ".join(f"{length:,.0f}" for length in summary.lengths), "")
    return table


def _means(values: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean of the values of each group."""
    return np.bincount(groups, weights=values) / np.bincount(groups)


def _standard_error(values: np.ndarray[Any, Any]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
