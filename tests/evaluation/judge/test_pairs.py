"""Files of answers, and pairs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.data.readers import DataError
from fastpref.evaluation.judge.answers import Answers, read_answers, read_questions
from fastpref.evaluation.judge.pairs import match
from fastpref.utils.errors import UserError
from tests.helpers.data import write_jsonl

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "tea?"}]


def answers(folder: Path, name: str, *rows: dict[str, Any]) -> Answers:
    return read_answers(str(write_jsonl(folder / f"{name}.jsonl", list(rows))))


def row(prompt: Any, text: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": text, **more}


def test_every_form_of_an_answer_is_read(tmp_path: Path) -> None:
    rows = [
        row("tea?", "yes"),
        {"prompt": "tea?", "response": "yes"},
        {"instruction": "tea?", "output": "yes", "generator": "new", "dataset": "x"},
        {"instruction": "tea?", "input": "", "output": "yes"},
        row([{"role": "user", "content": "tea?"}], "yes"),
        row([{"role": "user", "content": "tea?"}], [{"role": "assistant", "content": "yes"}]),  # type: ignore[arg-type]
    ]
    read = answers(tmp_path, "mine", *rows)
    assert {(answer.question.text, answer.text) for answer in read.rows} == {("tea?", "yes")}
    assert read.generator == "new"
    assert answers(tmp_path, "mine", rows[0]).generator == "mine"
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    (answer,) = read_answers(str(path), "named").rows
    assert answer.question.text == "Add.\n\n1 2"
    (answer,) = answers(tmp_path, "chat", row(CHAT, "yes")).rows
    assert answer.question.text == "[system]\nBe kind.\n\n[user]\ntea?"
    assert answer.question.prompt == CHAT


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "tea?"}, "row 1: needs exactly one of completion, output, response, got none"),
        (row("a", "b", output="c"), "row 1: needs exactly one of completion, output, response, go"),
        (row("a", 3), "row 1: completion must be text, got int"),  # type: ignore[arg-type]
        (row("a", [1]), "row 1: completion must be text or a list of one message"),  # type: ignore[arg-type]
        (row(3, "a"), "row 1: prompt must be text or a list of messages, got int"),
        (row([], "a"), "row 1: prompt must be text or a list of messages, got a list"),
        (row([{"role": "user"}], "a"), "row 1: content of a message must be text, got null"),
        ({"output": "a"}, "row 1: no prompt; columns found: output"),
        ({"instruction": 3, "output": "a"}, "row 1: instruction must be text, got int"),
        (row("a", "b", instruction_difficulty="x"), "row 1: instruction_difficulty must be a num"),
    ],
)
def test_rows_that_are_no_answers_are_named(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        answers(tmp_path, "a", bad)


def test_files_that_hold_no_single_model(tmp_path: Path) -> None:
    rows = [row("a", "1", generator="x"), row("b", "2", generator="y")]
    with pytest.raises(DataError, match=r"holds answers of several generators \(x, y\); use one"):
        answers(tmp_path, "a", *rows)
    assert read_answers(str(tmp_path / "a.jsonl"), "both").generator == "both"
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(DataError, match="has no rows; use a file with answers"):
        read_answers(str(tmp_path / "e.json"))
    with pytest.raises(DataError, match="has no rows; use data with at least one prompt"):
        read_questions(str(tmp_path / "e.json"))


def test_answers_are_paired_by_their_prompts_in_the_order_of_the_selection(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", row("p", "a1"), row("q", "a2"), row("r", "a3"))
    b = answers(tmp_path, "b", row("r", "b3"), row("q", "b2"), row("p", "b1"))
    pairs = match(a, b).pairs
    assert [(pair.question.text, pair.a, pair.b) for pair in pairs] == [
        ("p", "a1", "b1"),
        ("q", "a2", "b2"),
        ("r", "a3", "b3"),
    ]
    chosen = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "r", "chosen": "x", "rejected": "y"}, {"prompt": "p"}]
    )
    selected = match(a, b, read_questions(str(chosen)))
    assert [(pair.a, pair.b, pair.prompt_number) for pair in selected.pairs] == [
        ("a3", "b3", 0),
        ("a1", "b1", 1),
    ]
    assert (selected.prompts, selected.missing, selected.unused) == (2, 0, 2)
    assert [pair.a for pair in match(a, b, limit=1).pairs] == ["a1"]


def test_missing_prompts_are_named_or_counted(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", row("p", "a1"), row("q", "a2"))
    b = answers(tmp_path, "b", row("p", "b1"), row("s", "b4"))
    message = r"no answer in .*b\.jsonl to row 2 \(q\); .*a\.jsonl to row 2 \(s\); add them, or"
    with pytest.raises(UserError, match=message):
        match(a, b)
    skipped = match(a, b, skip_missing=True)
    assert (len(skipped.pairs), skipped.prompts, skipped.missing, skipped.unused) == (1, 1, 2, 2)
    many = answers(tmp_path, "m", *(row(f"{k}", "x") for k in range(9)), row("p", "x"))
    with pytest.raises(UserError, match=r"row 3 \(2\) and 7 more; add them"):
        match(many, a)
    other = answers(tmp_path, "o", row("z", "x"))
    with pytest.raises(UserError, match="no prompt has an answer in both; use answers to the same"):
        match(a, other, skip_missing=True)


def test_several_answers_of_a_prompt_are_paired_one_by_one(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", row("p", "1"), row("q", "3"), row("p", "2"), row("q", "4"))
    b = answers(tmp_path, "b", row("q", "7"), row("q", "8"), row("p", "5"), row("p", "6"))
    pairs = match(a, b).pairs
    assert [(pair.a, pair.b, pair.prompt_number) for pair in pairs] == [
        ("1", "5", 0),
        ("2", "6", 0),
        ("3", "7", 1),
        ("4", "8", 1),
    ]
    fewer = answers(tmp_path, "f", row("p", "1"), row("q", "1"))
    with pytest.raises(
        UserError, match=r"row 1 \(p\): has 2 answers in .* and 1 in .*f\.jsonl; us"
    ):
        match(a, fewer)


def test_ids_pair_prompts_that_are_written_differently(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", row("tea?", "a1", id=7), row("pie?", "a2", id=8))
    b = answers(
        tmp_path,
        "b",
        {"instruction": "Pie?", "output": "b2", "question_id": "8"},
        {"instruction": "Tea?", "output": "b1", "question_id": "7"},
    )
    pairs = match(a, b, by="id").pairs
    assert [(pair.id, pair.question.text, pair.a, pair.b) for pair in pairs] == [
        ("7", "tea?", "a1", "b1"),
        ("8", "pie?", "a2", "b2"),
    ]
    c = answers(tmp_path, "c", row("tea?", "c1"))
    with pytest.raises(UserError, match=r"--match: row 1 \(tea\?\) has no id; add one, or use"):
        match(a, c, by="id")
    with pytest.raises(UserError, match="--match: expected prompt or id, got 'row'"):
        match(a, b, by="row")
    assert match(c, c).pairs[0].id == match(c, c).pairs[0].id != "None"


def test_the_difficulty_is_known_for_all_prompts_or_for_none(tmp_path: Path) -> None:
    rows = [row("p", "a", instruction_difficulty=0.5), row("q", "b")]
    a, b = answers(tmp_path, "a", *rows), answers(tmp_path, "b", row("p", "c"), row("q", "d"))
    message = "instruction_difficulty: 1 of 2 prompts have one; give it for all or for none"
    with pytest.raises(DataError, match=message):
        match(a, b)
    full = answers(tmp_path, "f", rows[0])
    assert match(full, answers(tmp_path, "g", row("p", "c"))).pairs[0].question.difficulty == 0.5
