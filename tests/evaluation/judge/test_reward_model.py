"""A reward model as judge, against transformers on one sequence at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.judge.cache import open_cache
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.reward_model import RewardJudge, RewardModel
from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.progress import Display
from tests.helpers.data import LLAMA, WORDS, write_jsonl

Command = Callable[..., CompletedProcess[str]]


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, **changed: Any) -> str:
    """A Llama of random weights with a score for each sequence."""
    torch.manual_seed(0)
    options = {**LLAMA, "initializer_range": 0.3, "num_labels": 1, **changed}
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    pad = tokenizer.convert_tokens_to_ids("<pad>")
    return save(tmp_path_factory.mktemp("rm") / "model", tokenizer, pad_token_id=pad)


def pair(k: int, a: str, b: str, prompt: Any = None) -> Pair:
    prompt = prompt or f"{WORDS[k % 10]}?"
    return Pair(Question(k + 1, prompt, str(prompt), None, None, None), k, a, b)


def plain_score(source: str, prompt: str, answer: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


PAIRS = [pair(k, "a" + " really" * (k % 5), "no " + WORDS[k] * (1 + k % 3)) for k in range(10)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_answer_with_the_higher_reward_wins(
    source: str, tmp_path: Path, display: Display, batch_size: int
) -> None:
    judge = RewardJudge(RewardModel(source, "cpu"), batch_size)
    with open_cache(tmp_path / "c.jsonl") as cache:
        judged = judge.judge(PAIRS, cache, display)
    margins = np.array(
        [
            plain_score(source, each.question.text, each.a)
            - plain_score(source, each.question.text, each.b)
            for each in PAIRS
        ]
    )
    assert len({*np.sign(margins)}) == 2 and np.abs(margins).min() > 1e-3
    assert [each.preference for each in judged] == list((np.sign(margins) + 1) / 2)
    with open_cache(tmp_path / "c.jsonl") as cache:
        soft = RewardJudge(judge.model, batch_size, bradley_terry=True).judge(PAIRS, cache, display)
    expected = 1 / (1 + np.exp(-margins))
    np.testing.assert_allclose([each.preference for each in soft], expected, atol=1e-5)


def test_equal_answers_are_ties_and_messages_are_a_prompt(
    source: str, tmp_path: Path, display: Display
) -> None:
    chat = [{"role": "user", "content": "tea?"}]
    judge = RewardJudge(RewardModel(source, "cpu"))
    with open_cache(tmp_path / "c.jsonl") as cache:
        judged = judge.judge([pair(0, "yes", "yes"), pair(1, "yes", "no", chat)], cache, display)
        rewards = [record["reward"] for record in cache.records.values()]
    assert judged[0].preference == 0.5
    expected = {plain_score(source, "tea?", text) for text in ("yes", "no")}
    assert all(any(abs(value - each) < 1e-4 for each in rewards) for value in expected)


def test_scores_in_the_cache_are_used_until_the_model_changes(
    source: str, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(source, str(tmp_path / "model"))
    judge = RewardJudge(RewardModel(source, "cpu"))
    with open_cache(tmp_path / "c.jsonl") as cache:
        first = judge.judge(PAIRS, cache, display)
        size = len(cache.records)
        monkeypatch.setattr(RewardModel, "scores", lambda self, sequences: 1 / 0)
        assert judge.judge(PAIRS, cache, display) == first
        config = Path(source) / "config.json"
        config.write_text(config.read_text() + "\n")
        with pytest.raises(ZeroDivisionError):
            RewardJudge(RewardModel(source, "cpu")).judge(PAIRS, cache, display)
        assert len(cache.records) == size


def test_a_model_without_a_padding_token_scores_one_answer_at_a_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = save(tmp_path / "m", tokenizer)
    model = RewardModel(source, "cpu")
    assert model.model.config.pad_token_id is None
    texts = ["yes", "no, never, not at all"]
    sequences = [model.encode(PAIRS[0].question, text) for text in texts]
    expected = [plain_score(source, PAIRS[0].question.text, text) for text in texts]
    assert model.scores(sequences) == pytest.approx(expected, abs=1e-5)


def test_models_that_give_no_rewards(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, source: str
) -> None:
    with pytest.raises(ModelError, match="--reward-model: cannot load no/such: "):
        RewardModel("no/such", "cpu")
    three = save(tmp_path / "three", tokenizer, num_labels=3)
    with pytest.raises(ModelError, match="three has 3 labels; use a classifier with one, whose o"):
        RewardModel(three, "cpu")
    with pytest.raises(ModelError, match="llama has 2 labels; use a classifier with one"):
        RewardModel(tiny_llama, "cpu")
    plain = save(tmp_path / "plain", tokenizer)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = Path(plain) / name
        if path.exists():
            path.write_text("{}") if name.endswith("json") else path.unlink()
    with pytest.raises(ModelError, match="plain has no chat template; use a reward model with one"):
        RewardModel(plain, "cpu")
    model = RewardModel(source, "cpu")
    with pytest.raises(UserError, match=r"row 1 \(tea\?\): prompt and answer have .* has 256 posi"):
        model.encode(PAIRS[0].question, "really " * 300)
    model.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"row 1 \(tea\?\): chat template of .* failed: no; leave"):
        model.encode(PAIRS[0].question, "yes")
    with torch.no_grad():
        model.model.score.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="gives rewards that are not finite; fix it"):
        model.scores([[1, 2]])


def test_a_causal_model_has_no_score(tiny_llama: str, tmp_path: Path) -> None:
    """Its layer for scores would be random, and so would be every verdict."""
    config = json.loads((Path(tiny_llama) / "config.json").read_text())
    for path in Path(tiny_llama).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **labels}))
    message = r"has no weights named score\.weight, which would be random; use a trained reward m"
    with pytest.raises(ModelError, match=message):
        RewardModel(str(tmp_path), "cpu")


def test_the_command_writes_the_same_files(fastpref: Command, source: str, tmp_path: Path) -> None:
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        for name, rows in {
            "new": [{"prompt": each.question.text, "completion": each.a} for each in PAIRS],
            "old": [{"prompt": each.question.text, "completion": each.b} for each in PAIRS],
        }.items()
    ]
    out = tmp_path / "out"
    options = ("--reward-model", source, "--device", "cpu", "--out", str(out))
    done = fastpref("judge", *files, *options)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((out / "judge.json").read_text())
    assert numbers["wins"] + numbers["losses"] == 10
    assert numbers["consistency"] is None and numbers["judge"] == source
    (first, *_) = json.loads((out / "annotations.json").read_text())
    game = json.loads((out / "arena-hard.jsonl").read_text().splitlines()[0])["games"]
    wins = first["preference"] == 2
    assert [each["score"] for each in game] == (["B>A", "A>B"] if wins else ["A>B", "B>A"])
    assert game[0]["judgment"]["answer"].startswith("rewards ")
