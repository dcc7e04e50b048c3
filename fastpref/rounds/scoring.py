"""Scores of the completions of a round, in a file that `fastpref data pairs` reads, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from fastpref.data.tokenize import chunks
from fastpref.evaluation.comparisons import Group
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

_CHUNK = 64  # completions between two looks at the signals


class Scorer(Protocol):
    """Gives a number to each completion of its prompt, the higher the better."""

    @property
    def fingerprint(self) -> str:
        """Text that is another one for another scorer."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]: ...


@runtime_checkable
class Comparer(Protocol):
    """Gives a number to each completion by comparison with others of its prompt."""

    @property
    def fingerprint(self) -> str:
        """Text that is another one for another comparer."""

    def compare(self, groups: Sequence[Group], check: Callable[[], None]) -> list[list[float]]: ...


def score(
    files: RoundFiles,
    kind: str,
    key: str,
    samples: Sequence[Row],
    scorer: Callable[[], Scorer | Comparer],
    penalty: float,
    display: Display,
    check: Callable[[], None],
    opponents: Sequence[Row] | None = None,
) -> list[list[float]]:
    """Read the scores from their file, or compute them and write it; P lists of K numbers.

    scorer: called if they are missing. penalty: subtracted where a completion is not finished.
    opponents: samples that a comparer compares with; without them, those of a prompt.

    Raises UserError for a scorer that gives another number of scores, or one that is not finite.
    """
    rows = files.read(kind, key)
    if rows is None:
        scores = iter(_scores(samples, scorer(), penalty, display, check, opponents))
        rows = [_row(sample, scores) for sample in samples]
        files.write(kind, key, rows)
    return [row["scores"] for row in rows]


def _row(sample: Row, scores: Any) -> Row:
    kept = {
        name: value for name, value in sample.items() if name not in ("prompt_tokens", "tokens")
    }
    return {**kept, "scores": [next(scores) for _ in sample["completions"]]}


def _scores(
    samples: Sequence[Row],
    scorer: Scorer | Comparer,
    penalty: float,
    display: Display,
    check: Callable[[], None],
    opponents: Sequence[Row] | None,
) -> list[float]:
    if isinstance(scorer, Comparer):
        compared = scorer.compare(_groups(samples, opponents), check)
        finished = [flag for sample in samples for flag in sample["finished"]]
        values = [value for group in compared for value in group]
        return [
            value - (0.0 if flag else penalty) for value, flag in zip(values, finished, strict=True)
        ]
    flat = [
        (sample["prompt"], text, finished)
        for sample in samples
        for text, finished in zip(sample["completions"], sample["finished"], strict=True)
    ]
    display.phase("score", len(flat))
    scores: list[float] = []
    for part in chunks(flat, _CHUNK):
        values = scorer([prompt for prompt, _, _ in part], [text for _, text, _ in part])
        if len(values) != len(part):
            raise UserError(
                f"rounds.scorer: gave {len(values):,} scores for {len(part):,} completions; fix it"
            )
        for value, (_, text, finished) in zip(values, part, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"rounds.scorer: gave {value} for the completion {text[:40]!r}; fix it"
                )
            scores.append(float(value) - (0.0 if finished else penalty))
        display.advance(len(scores))
        check()
    return scores


def _groups(samples: Sequence[Row], opponents: Sequence[Row] | None) -> list[Group]:
    others = [None] * len(samples) if opponents is None else [o["completions"] for o in opponents]
    return [
        Group(sample["prompt"], sample["completions"], other)
        for sample, other in zip(samples, others, strict=True)
    ]
