"""Scores of responses by reward models and functions, in files and on RewardBench's subsets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fastpref.data.readers import DataError
from fastpref.evaluation import reward_bench, score
from fastpref.evaluation.comparisons import Group, JudgeScorer
from fastpref.evaluation.scorers import FunctionScorer, RewardModelScorer, model_scorer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import write_jsonl
from tests.helpers.pair_models import write_pair_model
from tests.helpers.reward_models import random_reward_model

Command = Callable[..., CompletedProcess[str]]
CHAT = [{"role": "user", "content": "tea?"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "tea?", "chosen": " yes", "rejected": " no no", "subset": "hep-go", "id": 7},
    {"prompt": CHAT, "completions": ["a", "bcd"], "scores": [9, 9]},
    {"prompt": "tea?", "completion": " yes please"},
]
RULES = """
def length(prompts, completions):
    return [len(prompt) * 100 + len(text) for prompt, text in zip(prompts, completions)]
def short(prompts, completions): return [1.0]
def words(prompts, completions): return ["one"] * len(completions)
def infinite(prompts, completions): return [float("inf")] * len(completions)
def broken(prompts, completions): raise KeyError("tea")
number = 3
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A reward model of random weights."""
    return random_reward_model(tmp_path_factory.mktemp("scorer") / "model", tokenizer)


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rules.py").write_text(RULES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rules", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def plain(source: str, ids: Sequence[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    return float(model(torch.tensor([ids])).logits)


def test_texts_are_messages_unless_they_are_scored_as_they_are(
    source: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "yes"}], tokenize=False
    )
    expected = plain(source, tokenizer(chat, add_special_tokens=False)["input_ids"])
    scorer = RewardModelScorer(source, "cpu", batch_size=2)
    answers = ["yes", "no, never, not at all", "yes"]
    scores = scorer(["tea?", CHAT, CHAT], answers)
    assert scores[0] == pytest.approx(expected, abs=1e-5) == scores[2] and scores[1] != scores[0]
    text = RewardModelScorer(source, "cpu", text=True)
    ids = [*tokenizer("tea? yes")["input_ids"], tokenizer.eos_token_id]
    assert text(["tea?"], [" yes"])[0] == pytest.approx(plain(source, ids), abs=1e-5)
    assert text.fingerprint != scorer.fingerprint


def test_a_file_keeps_its_columns_and_gets_scores(
    fastpref: Command, rules: Path, source: str
) -> None:
    data = write_jsonl(rules / "d.jsonl", ROWS)
    done = fastpref("score", "--function", "rules:length", "--data", str(data), cwd=rules)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0] == {**ROWS[0], "chosen_score": 404.0, "rejected_score": 406.0}
    assert rows[1] == {**ROWS[1], "scores": [101.0, 103.0]}
    assert rows[2] == {**ROWS[2], "score": 411.0}
    out = ("--out", str(rules / "o.jsonl"), "--device", "cpu", "--limit", "2")
    done = fastpref("score", source, "--data", str(data), *out)
    assert done.returncode == 0 and "as messages of a user; see --text" in done.stderr
    written = [json.loads(line) for line in (rules / "o.jsonl").open()]
    assert len(written) == 2 and written[1]["scores"] != [9, 9]
    done = fastpref("score", source, "--data", str(data), *out)
    assert done.returncode == 2 and "o.jsonl is already there; choose another" in done.stderr


def test_the_fingerprint_of_a_function_changes_with_its_file(rules: Path) -> None:
    first = FunctionScorer("rules:length").fingerprint
    assert FunctionScorer("rules:length").fingerprint == first
    assert FunctionScorer("rules:short").fingerprint != first
    (rules / "rules.py").write_text(RULES + "\n")
    assert FunctionScorer("rules:length").fingerprint != first


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rules", "--function: expected module:function, got 'rules'"),
        (
            "no_such:f",
            "--function: cannot import no_such:f: No module named 'no_such'; name a func",
        ),
        ("rules:none", "--function: cannot import rules:none: module 'rules' has no attribute"),
        ("rules:number", "--function: rules:number is no function, got 3"),
        ("rules:short", "rules:short returned 1 scores for 2 completions; return one for each"),
        ("rules:words", "--function: rules:words must return a list of numbers, got ['one', 'one'"),
        ("rules:infinite", "returned inf for completion 1 of 2; return finite numbers"),
        ("rules:broken", "--function: rules:broken raised KeyError: 'tea'; fix it"),
    ],
)
def test_functions_that_give_no_scores(rules: Path, name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        FunctionScorer(name)(["a", "b"], ["c", "d"])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "no chosen and rejected, completion or completions; columns found: prom"),
        (
            {"prompt": CHAT, "completion": "a", "tools": [{"name": "f"}]},
            "tools: is not passed to scorers; leave the row out",
        ),
        (
            {"prompt": CHAT, "completion": [{"role": "assistant", "content": "a"}, *CHAT]},
            "a response must be one message of the assistant with text; leave it out",
        ),
    ],
)
def test_rows_that_cannot_be_scored(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        score.responses_of(row)
    assert says in str(caught.value)


def test_what_is_to_be_scored_by_what_must_be_said(
    fastpref: Command, rules: Path, source: str, tiny_llama: str
) -> None:
    (rules / "empty.jsonl").write_text("\n")
    data = str(write_jsonl(rules / "d.jsonl", ROWS))
    function = ("score", "--function", "rules:length", "--data")
    for arguments, says in (
        (("score", "--data", data), "score: expected a reward model or --function, one of them"),
        (("score", source), "--data: is missing; name a file with responses"),
        ((*function, "empty.jsonl"), "empty.jsonl: has no rows; use data with at least one resp"),
        (("eval", source, "--data", data), "d.jsonl, row 2: a reward model is measured on pairs"),
        (("eval", source, "--data", "empty.jsonl"), "has no rows; use data with at least one pai"),
        (
            ("eval", source, "--data", data, "--against", source),
            "--against: is for language models",
        ),
        (
            ("sample", source, "--prompts", data),
            "is a sequence classifier, such as a reward model, ",
        ),
        (("eval", tiny_llama, "--data", data, "--text"), "--text: is for reward models, and "),
    ):
        done = fastpref(*arguments, cwd=rules)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_an_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a"}')
    assert not reward_bench.is_classifier(str(tmp_path))
    with pytest.raises(UserError, match="is an adapter without a trained head"):
        RewardModelScorer(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "MODEL: cannot load nowhere: "),
        (("llama",), "MODEL: llama has 2 labels; use a classifier with one"),
        (("llama", None, 8, "tpu"), "--device: expected auto, cpu or cuda, got 'tpu'"),
        (("llama", None, 8, "cpu", "fp8"), "--dtype: expected bfloat16 or float32 or float64, go"),
        ((None, "nowhere:f"), "--function: cannot import nowhere:f: "),
    ],
)
def test_messages_of_score_name_its_arguments(
    arguments: tuple[Any, ...], says: str, tiny_llama: str, display: Display,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(tiny_llama).parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = [Path(tiny_llama).name if each == "llama" else each for each in arguments]
    with pytest.raises(UserError) as caught:
        score.Source(*given).build(display)
    assert str(caught.value).startswith(says.replace("llama", Path(tiny_llama).name))


def test_messages_of_eval_name_its_arguments(
    source: str, tiny_llama: str, display: Display
) -> None:
    for device, dtype, says in (("tpu", None, "--device: exp"), ("cpu", "fp8", "--dtype: exp")):
        with pytest.raises(UserError, match=f"^{says}"):
            reward_bench.run(source, "d.jsonl", None, display, device=device, dtype=dtype)
    with pytest.raises(UserError, match=r"^MODEL: .* has 2 labels; use a classifier with one"):
        reward_bench.run(tiny_llama, "d.jsonl", None, display, device="cpu")


def test_a_caller_has_a_name_of_its_own_for_a_scorer(
    rules: Path, source: str, display: Display, tokenizer: PreTrainedTokenizerFast
) -> None:
    field = "rounds.scorer.reward_model"
    with pytest.raises(UserError, match=f"^{field}: cannot load nowhere: "):
        model_scorer("nowhere", display, option=field)
    scorer = model_scorer(source, display, "cpu", option=field)
    assert isinstance(scorer, RewardModelScorer)
    with torch.no_grad():
        scorer.model.model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=f"^{field}: .* gives rewards that are not finite; fix it"):
        scorer(["a"], ["b"])
    ranker = write_pair_model(rules / "ranker", tokenizer, ranker_type="pairranker")
    with pytest.raises(UserError, match=f"^{field}: .* is a ranker in llm-blender's own layout"):
        model_scorer(ranker, display, option=field)
    answers = rules / "answers.jsonl"
    answers.write_text("text\n")
    compares = write_pair_model(rules / "compares", tokenizer)
    pair_scorer = model_scorer(compares, display, "cpu", answers=answers, option=field)
    assert isinstance(pair_scorer, JudgeScorer)
    with pytest.raises(UserError, match=rf"^{field}: .*answers\.jsonl, line 1: not an answer of a"):
        pair_scorer.compare([Group("a", ["b", "c"])], lambda: None)
    with pytest.raises(UserError, match=r"^rounds\.scorer\.function: rules:broken raised KeyError"):
        FunctionScorer("rules:broken", "rounds.scorer.function")(["a"], ["b"])


def test_sections_weigh_as_those_of_reward_bench(
    rules: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pairs(subset: str, right: int, wrong: int) -> list[dict[str, str]]:
        good = {"prompt": "a", "chosen": "long", "rejected": "b", "subset": subset}
        bad = {**good, "chosen": "b", "rejected": "b"}  # equal scores are not right
        return [good] * right + [bad] * wrong

    rows = [
        *pairs("math-prm", 1, 0), *pairs("hep-go", 1, 2), *pairs("hep-rust", 1, 0),
        *pairs("mt-bench-med", 1, 1), *pairs("donotanswer", 3, 1), *pairs("other", 0, 2),
    ]  # fmt: skip
    data = write_jsonl(rules / "d.jsonl", rows)
    result = reward_bench.evaluate(FunctionScorer("rules:length"), str(data), display)
    # Of reasoning, 1 of 1 weighs 4 and 2 of 4 weigh 4.
    assert result["sections"] == {"Chat": 0.5, "Safety": 0.75, "Reasoning": 0.75}
    assert "score" not in result and result["accuracy"] == 7 / 13
    monkeypatch.setattr(reward_bench, "SECTIONS", {"Chat": ("mt-bench-med",), "B": ("hep-go",)})
    result = reward_bench.evaluate(FunctionScorer("rules:length"), str(data), display)
    assert result["score"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    lines = reward_bench.table({**result}).row_count
    assert lines == 6 + 2 + 2
