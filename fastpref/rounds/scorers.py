"""The scorer that a config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.config import RoundJudge, RoundScorer, Training
from fastpref.rounds.scoring import Comparer, Scorer
from fastpref.utils.model_sources import check_source
from fastpref.utils.progress import Display

if TYPE_CHECKING:
    from fastpref.evaluation.judge.chat_judge import ChatJudge

ANSWERS = "answers.jsonl"  # of a judge or a model that compares, beside the folders of the rounds
_FUNCTION, _REWARD_MODEL = "rounds.scorer.function", "rounds.scorer.reward_model"
_OF_JUDGE = (
    *("endpoint", "model", "api_key_env", "template", "temperature", "max_tokens", "seed", "body"),
    *("workers", "timeout", "retries"),
)
_TEST = "This is a test of the connection. Answer with one word: ready."


def make_scorer(options: RoundScorer, training: Training, display: Display) -> Scorer | Comparer:
    """Load the reward model, import the function, or ask the judge, of `rounds.scorer`.

    Raises UserError, which names the field, here and in its calls.
    """
    from fastpref.evaluation.comparisons import JudgeScorer
    from fastpref.evaluation.scorers import FunctionScorer, model_scorer

    answers = Path(training.output_dir) / "rounds" / ANSWERS
    if options.judge is not None:
        return JudgeScorer(_chat_judge(options.judge), answers, display, _judge_field)
    if options.function is not None:
        return FunctionScorer(options.function, _FUNCTION)
    assert options.reward_model is not None
    return model_scorer(
        options.reward_model, display, training.device, answers=answers, option=_REWARD_MODEL
    )


def check_scorer(options: RoundScorer, display: Display) -> None:
    """Raise UserError for a scorer that cannot work, as far as that is cheap to know.

    A judge is asked one short question, with the options of its real ones and as many tries. A
    function is imported. Of a reward model only the place is checked.
    """
    from fastpref.evaluation.scorers import FunctionScorer

    if options.judge is not None:
        endpoint = _chat_judge(options.judge).endpoint
        endpoint.ask(_TEST, "a test", note=lambda why: display.note(f"judge: {why}; trying again"))
    elif options.function is not None:
        FunctionScorer(options.function, _FUNCTION)
    else:
        check_source(_REWARD_MODEL, str(options.reward_model))


def _chat_judge(judge: RoundJudge) -> ChatJudge:
    from fastpref.evaluation.judge.options import ChatOptions

    values = {name: getattr(judge, name) for name in _OF_JUDGE}
    values["template"] = None if judge.template is None else Path(judge.template)
    values["body"] = tuple(f"{name}={json.dumps(value)}" for name, value in judge.body.items())
    return ChatOptions(**values, names=_judge_field).build()


def _judge_field(option: str) -> str:
    """Field of the config for an option of `fastpref judge`; the file of answers has none."""
    return "rounds.scorer.judge" if option == "cache" else f"rounds.scorer.judge.{option}"
