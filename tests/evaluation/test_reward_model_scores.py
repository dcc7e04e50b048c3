"""Scores of a reward model: those of the trainer's tokens, and equal ones of equal responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.data.dataset import load_groups
from fastpref.evaluation import reward_bench
from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.scorers import RewardModelScorer
from tests.helpers.data import write_jsonl
from tests.helpers.reward_models import random_reward_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A reward model of random weights."""
    return random_reward_model(tmp_path_factory.mktemp("scores") / "model", tokenizer)


def test_text_is_scored_on_the_tokens_that_are_trained(
    source: str, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., Config],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompts = ["", "User: tea?\nAssistant:", "<s>tea?", "te", " "]
    rows = [{"prompt": p, "completions": [" tea"], "scores": [1]} for p in prompts]
    file = str(write_jsonl(tmp_path / "d.jsonl", rows))
    groups = load_groups(file, tokenizer, make_config(data__train=file).data, "groupwise")
    model = RewardModelScorer(source, "cpu", text=True).model
    for index, prompt in enumerate(prompts):
        ids = model.encode(Question(1, prompt, prompt, None, None, None), " tea")
        group = groups[index]
        assert ids == [*group.prompt.tolist(), *group.responses[0].tolist()], prompt


def test_equal_responses_have_equal_scores_in_any_batch(source: str) -> None:
    texts = ["tea", "tea and coffee", "tea", "coffee", "tea"]
    for batch_size in (1, 2, 5):
        scores = RewardModelScorer(source, "cpu", batch_size=batch_size)(["tea?"] * 5, texts)
        assert scores[0] == scores[2] == scores[4]
        assert len(set(scores)) == 3


def test_a_tie_of_equal_responses_is_not_right(source: str, tmp_path: Path, display: Any) -> None:
    rows = [{"prompt": "q", "chosen": text, "rejected": text} for text in ("a", "tea b", "c" * 9)]
    data = str(write_jsonl(tmp_path / "d.jsonl", rows))
    result = reward_bench.evaluate(RewardModelScorer(source, "cpu"), data, display)
    assert result["accuracy"] == 0 and result["margin"] == 0


@pytest.mark.parametrize(
    ("values", "is_classifier"),
    [
        ({"modules_to_save": ["score"], "task_type": None}, True),
        ({"modules_to_save": None, "target_modules": ["q_proj", "score"]}, True),
        ({"task_type": "SEQ_CLS"}, True),
        ({"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}, False),
        ({"task_type": "CAUSAL_LM", "target_modules": "all-linear"}, False),
    ],
)
def test_an_adapter_of_a_classifier_is_not_measured_as_a_language_model(
    tmp_path: Path, values: dict[str, Any], is_classifier: bool
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    assert reward_bench.is_classifier(str(tmp_path)) is is_classifier
