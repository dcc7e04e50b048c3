"""Pairs of answers of two models to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastpref.data.readers import DataError
from fastpref.evaluation.judge.answers import Answer, Answers, Question
from fastpref.model.generate import require
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import UserError

MATCHES = ("prompt", "id")
_NAMED = 3  # missing prompts that a message names
Key = Callable[[Question], str]


class Pair(NamedTuple):
    """Answers `a` of the model and `b` of the baseline to one prompt."""

    question: Question
    prompt_number: int  # pairs of the same prompt share it
    a: str
    b: str

    @property
    def id(self) -> str:
        """Identity of the prompt: that of its row, or a hash of its text."""
        return self.question.id or sha256(self.question.text)[:32]

    @property
    def is_identical(self) -> bool:
        return self.a == self.b


class Pairs(NamedTuple):
    """Pairs in the order of the prompts, and the numbers of what was left out."""

    pairs: list[Pair]
    prompts: int
    missing: int  # prompts without an answer of a model
    unused: int  # answers to prompts that were not selected


def match(
    a: Answers,
    b: Answers,
    selected: list[Question] | None = None,
    *,
    by: str = "prompt",
    skip_missing: bool = False,
    limit: int | None = None,
) -> Pairs:
    """Pair the answers of two models, the k-th with the k-th where a prompt has several.

    selected: prompts to compare, in order; None is those of `a`, then those that only `b` has.
    by: "prompt" compares the texts of prompts, "id" their ids.
    skip_missing: leave out prompts that a model has no answer to.
    limit: number of prompts to compare, the first ones.

    Raises UserError that names the first missing prompts, unless they are skipped, and prompts
    with different numbers of answers.
    """
    key = _key(by)
    answers_a, answers_b = _grouped(a, key), _grouped(b, key)
    order = selected if selected is not None else [answer.question for answer in (*a.rows, *b.rows)]
    questions = _distinct(order, key)
    absent = [
        (side.source, question)
        for name, question in questions.items()
        for side, answers in ((a, answers_a), (b, answers_b))
        if name not in answers
    ]
    if absent and not skip_missing:
        raise UserError(_refusal(absent))
    complete = [name for name in questions if name in answers_a and name in answers_b]
    if not complete:
        raise UserError(
            f"{a.source} and {b.source}: no prompt has an answer in both; use answers to the same "
            "prompts"
        )
    pairs: list[Pair] = []
    for number, name in enumerate(complete[:limit]):
        texts_a, texts_b = answers_a[name], answers_b[name]
        if len(texts_a) != len(texts_b):
            raise UserError(
                f"{questions[name].name}: has {len(texts_a)} answers in {a.source} and "
                f"{len(texts_b)} in {b.source}; use as many of both"
            )
        pairs += [
            Pair(questions[name], number, first.text, second.text)
            for first, second in zip(texts_a, texts_b, strict=True)
        ]
    used = sum(len(answers[name]) for answers in (answers_a, answers_b) for name in complete)
    return Pairs(
        pairs,
        prompts=len(complete[:limit]),
        missing=len(questions) - len(complete),
        unused=len(a.rows) + len(b.rows) - used,
    )


def _key(by: str) -> Key:
    require("match", by, by in MATCHES, " or ".join(MATCHES))
    return _id if by == "id" else lambda question: question.text


def _id(question: Question) -> str:
    if question.id is None:
        raise UserError(f"--match: {question.name} has no id; add one, or use --match prompt")
    return question.id


def _grouped(answers: Answers, key: Key) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers.rows:
        groups.setdefault(key(answer.question), []).append(answer)
    return groups


def _distinct(questions: Iterable[Question], key: Key) -> dict[str, Question]:
    """First question of each key; all of them need a difficulty, or none."""
    distinct: dict[str, Question] = {}
    for question in questions:
        distinct.setdefault(key(question), question)
    known = sum(question.difficulty is not None for question in distinct.values())
    if 0 < known < len(distinct):
        raise DataError(
            f"instruction_difficulty: {known} of {len(distinct)} prompts have one; give it for all "
            "or for none"
        )
    return distinct


def _refusal(absent: list[tuple[str, Question]]) -> str:
    names = "; ".join(f"{source} to {question.name}" for source, question in absent[:_NAMED])
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    return f"no answer in {names}{more}; add them, or leave the prompts out with --skip-missing"
