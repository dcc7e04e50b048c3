"""`fastpref judge`: read the answers, ask the judge, write the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.evaluation.judge import outputs
from fastpref.evaluation.judge.answers import Answers, read_answers, read_questions
from fastpref.evaluation.judge.cache import open_cache
from fastpref.evaluation.judge.options import ChatOptions, RewardOptions
from fastpref.evaluation.judge.pairs import Pairs, match
from fastpref.evaluation.judge.summary import summarize, table
from fastpref.evaluation.judge.verdicts import Judge
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class Selection:
    """Answers to compare: files of the model and the baseline, and options of `match`."""

    a: str
    b: str
    prompts: str | None = None
    names: str | None = None
    match: str = "prompt"
    skip_missing: bool = False
    limit: int | None = None


def run(
    selection: Selection,
    options: ChatOptions | RewardOptions,
    out: Path,
    cache: Path | None,
    display: Display,
) -> None:
    """Judge all pairs, print the numbers and write them to the folder `out`.

    cache: file of the judge's answers; None is `answers.jsonl` in `out`. Raises UserError in one
    line, e.g. if `out` holds results of other settings.
    """
    a, b = _answers(selection)
    pairs = _pairs(selection, a, b, display)
    judge = options.build()
    settings = _settings(pairs, a, b, judge)
    _check_folder(out, settings)
    with open_cache(cache or out / outputs.ANSWERS) as answers:
        judged = judge.judge(pairs.pairs, answers, display)
    names = (a.generator, b.generator)
    summary = summarize(judged, judge.positional)
    outputs.write(out, judged, summary, names, judge.name, settings)
    display.console.print(table(summary, *names))
    display.note(str(out / outputs.RESULT))


def _answers(selection: Selection) -> tuple[Answers, Answers]:
    name_a = name_b = None
    if selection.names is not None:
        name_a, comma, name_b = (part.strip() for part in selection.names.partition(","))
        if not (name_a and comma and name_b):
            raise UserError(f"--names: expected two names such as new,old, got {selection.names!r}")
    a, b = read_answers(selection.a, name_a), read_answers(selection.b, name_b)
    if a.generator == b.generator:
        raise UserError(
            f"{a.source} and {b.source}: both are of {a.generator}; name the models with --names"
        )
    return a, b


def _pairs(selection: Selection, a: Answers, b: Answers, display: Display) -> Pairs:
    questions = None if selection.prompts is None else read_questions(selection.prompts)
    pairs = match(
        a,
        b,
        questions,
        by=selection.match,
        skip_missing=selection.skip_missing,
        limit=selection.limit,
    )
    display.note(
        f"{a.generator} against {b.generator}: {len(pairs.pairs):,} pairs of {pairs.prompts:,} "
        f"prompts; left out: {pairs.missing:,} prompts without both answers, {pairs.unused:,} "
        "answers to other prompts"
    )
    return pairs


def _settings(pairs: Pairs, a: Answers, b: Answers, judge: Judge) -> dict[str, Any]:
    """Settings of `judge.json`; equal ones, with the same judge, have the same results."""
    content = json.dumps(
        [(pair.question.text, pair.question.difficulty, pair.a, pair.b) for pair in pairs.pairs]
    )
    return {
        "model": a.source,
        "baseline": b.source,
        "pairs": sha256(content),
        "missing": pairs.missing,
        "judge": judge.settings,
    }


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if the folder holds results of other settings."""
    path = out / outputs.RESULT
    if not path.exists():
        return
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        previous = None
    if previous != settings:
        raise UserError(
            f"--out: {out} holds results of other answers or another judge; choose another folder"
        )
