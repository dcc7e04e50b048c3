"""The scorer that a config names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpref.config import ConfigError, RoundJudge, RoundScorer, Training
from fastpref.rounds.scoring import Comparer, Group, Scorer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

ANSWERS = "answers.jsonl"  # of a judge or a model that compares, beside the folders of the rounds
_OF_JUDGE = (
    *("endpoint", "model", "api_key_env", "template", "temperature", "max_tokens", "seed", "body"),
    *("workers", "timeout", "retries"),
)
# Options of the command line in messages, and the fields that stand for them here.
_FIELDS = {
    "--function": "rounds.scorer.function",
    "--reward-model": "rounds.scorer.reward_model",
    **{f"--{name.replace('_', '-')}": f"rounds.scorer.judge.{name}" for name in _OF_JUDGE},
    "--cache": "rounds.scorer.judge",
}


def make_scorer(options: RoundScorer, training: Training, display: Display) -> Scorer | Comparer:
    """Load the reward model, import the function, or ask the judge, of `rounds.scorer`.

    Raises UserError, which names the field, here and in its calls.
    """
    from fastpref.evaluation.comparisons import JudgeScorer
    from fastpref.evaluation.scorers import FunctionScorer, model_scorer

    answers = Path(training.output_dir) / "rounds" / ANSWERS
    with _naming_fields():
        if options.judge is not None:
            judge = _chat_options(options.judge).build()
            return _ComparerOfConfig(JudgeScorer(judge, answers, display))
        if options.function is not None:
            return _ScorerOfConfig(FunctionScorer(options.function))
        assert options.reward_model is not None
        scorer = model_scorer(options.reward_model, display, training.device, answers=answers)
        if isinstance(scorer, JudgeScorer):
            return _ComparerOfConfig(scorer)
        return _ScorerOfConfig(scorer)


def _chat_options(judge: RoundJudge) -> Any:
    """Options of the judge as the command line has them."""
    from fastpref.evaluation.judge.options import ChatOptions

    values = {name: getattr(judge, name) for name in _OF_JUDGE}
    values["template"] = None if judge.template is None else Path(judge.template)
    values["body"] = tuple(f"{name}={json.dumps(value)}" for name, value in judge.body.items())
    return ChatOptions(**values)


class _OfConfig:
    """Scorer or comparer whose errors name fields of the config."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def fingerprint(self) -> str:
        text: str = self._inner.fingerprint
        return text


class _ComparerOfConfig(_OfConfig):
    def compare(self, groups: Sequence[Group], check: Callable[[], None]) -> list[list[float]]:
        with _naming_fields():
            scores: list[list[float]] = self._inner.compare(groups, check)
            return scores


class _ScorerOfConfig(_OfConfig):
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        with _naming_fields():
            scores: list[float] = self._inner(prompts, completions)
            return scores


@contextmanager
def _naming_fields() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        text = str(error)
        for option, field in _FIELDS.items():
            text = text.replace(option, field)
        raise ConfigError(text) from None
