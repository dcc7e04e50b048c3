"""Scorers of completions: a model, or a Python function that the user names."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastpref.data.messages import Messages
from fastpref.data.tokenize import chunks
from fastpref.evaluation.comparisons import JudgeScorer
from fastpref.evaluation.judge.answers import Question, prompt_text
from fastpref.evaluation.judge.pair_model import PairJudge, PairModel, compares_pairs
from fastpref.evaluation.judge.reward_model import RewardModel
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import UserError, first_line, shown
from fastpref.utils.progress import Display


class Scorer(Protocol):
    """A function from prompts and completions, one of each per item, to their scores.

    fingerprint: text that differs between scorers with different scores, for the names of caches.
    """

    @property
    def fingerprint(self) -> str: ...

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str]
    ) -> list[float]: ...


class RewardModelScorer:
    """Rewards of a sequence classifier with one label; see `RewardModel`.

    Conversations are scored as its chat template writes them. A text prompt is one message of the
    user, or with `text` plain text. option: that names the model, for messages.
    """

    def __init__(
        self,
        path: str,
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int = 8,
        text: bool = False,
        option: str = "MODEL",
    ) -> None:
        self.model = RewardModel(path, device, dtype, text, option)
        state = ("reward-model", self.model.fingerprint, self.model.dtype, str(text))
        self.fingerprint = sha256(*state)
        self._batch_size = batch_size

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str]
    ) -> list[float]:
        sequences = [
            self.model.encode(
                Question(row, prompt, prompt_text(prompt), None, None, None), completion
            )
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1)
        ]
        # Equal sequences are one, so that rounding orders none of them. Neighbors of similar length
        # need little padding.
        order = sorted(set(map(tuple, sequences)), key=len)
        scores: dict[tuple[int, ...], float] = {}
        for batch in chunks(order, self._batch_size):
            scores.update(zip(batch, self.model.scores(list(map(list, batch))), strict=True))
        return [scores[tuple(sequence)] for sequence in sequences]


def model_scorer(
    path: str,
    display: Display,
    device: str = "auto",
    dtype: str | None = None,
    batch_size: int = 8,
    text: bool = False,
    answers: Path | None = None,
    option: str = "MODEL",
) -> RewardModelScorer | JudgeScorer:
    """Scorer of a reward model, or of a model that compares two answers, such as PairRM.

    answers: file for the comparisons, as of `JudgeScorer`. option: that names the model, for
        messages.
    """
    if not compares_pairs(path, option):
        return RewardModelScorer(path, device, dtype, batch_size, text, option)
    if text:
        raise UserError(f"--text: is not for {path}, which compares answers; leave it out")
    judge = PairJudge(PairModel(path, device, dtype, option), batch_size, bradley_terry=True)
    return JudgeScorer(judge, answers, display, lambda name: option)


class FunctionScorer:
    """A function `module:function` of the user, imported from the current folder or the path.

    It takes a list of prompts and a list of completions and returns a number for each.
    option: that names the function, for messages.

    Raises UserError if there is no such function.
    """

    def __init__(self, name: str, option: str = "--function") -> None:
        self.name, self.option = name, option
        self._function = _import(option, name)
        self.fingerprint = sha256("function", name, _source(self._function))

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str]
    ) -> list[float]:
        try:
            values = self._function(list(prompts), list(completions))
        except Exception as error:  # code of the user may raise anything
            raise UserError(
                f"{self.option}: {self.name} raised {type(error).__name__}: {first_line(error)}; "
                "fix it"
            ) from error
        try:
            scores = [float(value) for value in values]
        except (TypeError, ValueError):
            raise UserError(
                f"{self.option}: {self.name} must return a list of numbers, got {shown(values)}"
            ) from None
        if len(scores) != len(completions):
            raise UserError(
                f"{self.option}: {self.name} returned {len(scores):,} scores for "
                f"{len(completions):,} completions; return one for each"
            )
        for row, score in enumerate(scores, 1):
            if not math.isfinite(score):
                raise UserError(
                    f"{self.option}: {self.name} returned {score} for completion {row:,} of "
                    f"{len(scores):,}; return finite numbers"
                )
        return scores


def _import(option: str, name: str) -> Callable[..., Any]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(f"{option}: expected module:function, got {shown(name)}")
    # `fastpref` is an installed command, which does not search the current folder.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module)
        for part in function.split("."):
            target = getattr(target, part)
    except Exception as error:  # code of the user may raise anything
        raise UserError(
            f"{option}: cannot import {name}: {first_line(error)}; name a function of a module "
            "in this folder or on PYTHONPATH"
        ) from None
    if not callable(target):
        raise UserError(f"{option}: {name} is no function, got {shown(target)}")
    imported: Callable[..., Any] = target
    return imported


def _source(function: Callable[..., Any]) -> str:
    """Text of the file with a function, of which a change changes the fingerprint."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    return "" if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
