"""Scores of completions by comparison: each is judged against others of the same prompt."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.data.messages import Messages
from fastpref.data.tokenize import chunks
from fastpref.evaluation.judge.answers import Question, prompt_text
from fastpref.evaluation.judge.cache import open_cache
from fastpref.evaluation.judge.endpoint import OptionNames, on_command_line
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.verdicts import Judge
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

TIE = 0.5
_CHUNK = 64  # prompts between two looks at the signals


class Group(NamedTuple):
    """Completions of a prompt, and what they are compared with: without opponents, each other."""

    prompt: str | Messages
    completions: Sequence[str]
    opponents: Sequence[str] | None = None


class JudgeScorer:
    """Scores by a judge: the mean preference for a completion, in [0, 1], over its opponents.

    Pairs are judged in both orders; equal texts are a tie and are not asked about. A pair without a
    verdict does not count. Where a completion has no verdict at all, all completions of its prompt
    get the score of a tie, so that they make no pair; a note counts both.

    answers: file of the judge's answers, by content. Nothing in it is asked for again. Without one
        they last as long as the scorer.
    names: what messages call the options `template` and `cache`.
    """

    def __init__(
        self,
        judge: Judge,
        answers: Path | None,
        display: Display,
        names: OptionNames = on_command_line,
    ) -> None:
        self._judge, self._display, self._names = judge, display, names
        if answers is None:
            # The folder is deleted with the scorer.
            self._folder = tempfile.TemporaryDirectory()
            answers = Path(self._folder.name) / "answers.jsonl"
        self._answers = answers
        self.fingerprint = sha256("judge", json.dumps(judge.settings, sort_keys=True))

    def compare(self, groups: Sequence[Group], check: Callable[[], None]) -> list[list[float]]:
        """Scores of the completions of each group. check: called now and then, may raise.

        Raises UserError if the judge fails, or if none of its answers has a verdict.
        """
        asked = without_verdict = unscored = 0
        scores: list[list[float]] = []
        for part in chunks(groups, _CHUNK):
            pairs = [
                pair
                for number, group in enumerate(part, len(scores) + 1)
                for pair in _pairs(number, group)
            ]
            verdicts = self._verdicts(pairs)
            asked += len(pairs)
            without_verdict += sum(verdict is None for verdict in verdicts.values())
            for number, group in enumerate(part, len(scores) + 1):
                of_group = _scores(number, group, verdicts)
                unscored += of_group is None
                scores.append([TIE] * len(group.completions) if of_group is None else of_group)
            check()
        if without_verdict and unscored == len(groups):
            name, answers, option = self._judge.name, self._answers, self._names("template")
            raise UserError(
                f"{option}: no answer of {name} to {asked:,} pairs has a verdict "
                f"({answers}); ask for one as the default template does"
            )
        if without_verdict:
            self._display.note(
                f"note: {without_verdict:,} of {asked:,} pairs have no verdict of the judge and do "
                f"not count; {unscored:,} of {len(groups):,} prompts have no scores for this"
            )
        return scores

    def _verdicts(self, pairs: list[Pair]) -> dict[tuple[int, str, str], float | None]:
        """Preference for the first of two texts, by the number of the prompt and the texts."""
        with open_cache(self._answers, self._names("cache")) as cache:
            judged = self._judge.judge(pairs, cache, self._display)
        return {(one.pair.prompt_number, one.pair.a, one.pair.b): one.preference for one in judged}


def _pairs(number: int, group: Group) -> list[Pair]:
    """Pairs of different texts of a group, each once."""
    question = Question(number, group.prompt, prompt_text(group.prompt), None, None, None)
    opponents = group.completions if group.opponents is None else group.opponents
    texts = {_ordered(a, b): None for a in group.completions for b in opponents if a != b}
    return [Pair(question, number, a, b) for a, b in texts]


def _scores(
    number: int, group: Group, verdicts: dict[tuple[int, str, str], float | None]
) -> list[float] | None:
    """Mean preferences, or None if a completion has no verdict."""
    scores = []
    for index, text in enumerate(group.completions):
        if group.opponents is None:
            others = [other for k, other in enumerate(group.completions) if k != index]
        else:
            others = list(group.opponents)
        preferences = [_preference(number, text, other, verdicts) for other in others]
        known = [preference for preference in preferences if preference is not None]
        if not known:
            return None
        scores.append(statistics.fmean(known))
    return scores


def _preference(
    number: int, text: str, other: str, verdicts: dict[tuple[int, str, str], float | None]
) -> float | None:
    if text == other:
        return TIE
    a, b = _ordered(text, other)
    preference = verdicts[number, a, b]
    if preference is None or text == a:
        return preference
    return 1 - preference


def _ordered(a: str, b: str) -> tuple[Any, Any]:
    return (a, b) if a < b else (b, a)
