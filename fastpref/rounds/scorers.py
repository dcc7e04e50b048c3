"""The scorer that a config names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastpref.config import ConfigError, RoundScorer, Training
from fastpref.rounds.scoring import Scorer
from fastpref.utils.errors import UserError

# Options of the command line in messages, and the fields that stand for them here.
_FIELDS = {
    "--function": "rounds.scorer.function",
    "--reward-model": "rounds.scorer.reward_model",
}


def make_scorer(options: RoundScorer, training: Training) -> Scorer:
    """Load the reward model, or import the function, of `rounds.scorer`.

    Raises UserError, which names the field, here and in its calls.
    """
    from fastpref.evaluation.scorers import FunctionScorer, RewardModelScorer

    with _naming_fields():
        if options.function is not None:
            return _OfConfig(FunctionScorer(options.function))
        assert options.reward_model is not None
        return _OfConfig(RewardModelScorer(options.reward_model, training.device))


class _OfConfig:
    """Scorer whose errors name fields of the config."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @property
    def fingerprint(self) -> str:
        return self._scorer.fingerprint

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        with _naming_fields():
            return self._scorer(prompts, completions)


@contextmanager
def _naming_fields() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        text = str(error)
        for option, field in _FIELDS.items():
            text = text.replace(option, field)
        raise ConfigError(text) from None
