"""Prompts of every format, with the token ids of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.dataset import load_groups
from fastpref.data.prompts import prompt_of, read_prompts
from fastpref.data.readers import DataError
from tests.helpers.data import labelled, rows, scored, write_jsonl

USER = [{"role": "user", "content": "Tea or coffee?"}]
TEA = [{"role": "assistant", "content": "Tea."}]
COFFEE = [{"role": "assistant", "content": "Coffee."}]


@pytest.mark.parametrize("records", [rows(8), [{"chosen": USER + TEA, "rejected": USER + COFFEE}]])
def test_the_ids_are_those_of_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]]
) -> None:
    path = str(write_jsonl(tmp_path / "d.jsonl", records))
    trained = load_groups(path, tokenizer, Data(train=path, cache=str(tmp_path / "cache")))
    prompts = read_prompts(path, tokenizer)
    assert [p.ids.tolist() for p in prompts] == [
        trained[k].prompt.tolist() for k in range(len(trained))
    ]
    assert [p.row for p in prompts] == list(range(1, len(records) + 1))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "A"}, "A"),
        ({"prompt": USER}, USER),
        ({"chosen": "Q: tea", "rejected": "Q: coffee"}, "Q:"),
        ({"chosen": USER + TEA, "rejected": USER + COFFEE}, USER),
        ({"prompt": "Tea or coffee?", "chosen": TEA, "rejected": COFFEE}, USER),
        ({"prompt": USER, "completion": TEA, "label": True}, USER),
        ({"prompt": "A", "completions": ["B", "C"], "scores": [1, 0]}, "A"),
        ({"prompt": "A", "completion": None, "label": None, "score": 3}, "A"),
    ],
)
def test_the_prompt_of_a_row(row: dict[str, Any], prompt: Any) -> None:
    group = prompt_of(row)
    assert (group.prompt, group.responses, group.labels) == (prompt, (), None)


def test_tools_stay_with_the_prompt() -> None:
    assert prompt_of({"prompt": USER, "tools": '[{"name": "kettle"}]'}).tools == [
        {"name": "kettle"}
    ]


@pytest.mark.parametrize("records", [labelled(6), scored(6)])
def test_other_kinds_of_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]]
) -> None:
    prompts = read_prompts(str(write_jsonl(tmp_path / "d.jsonl", records)), tokenizer)
    assert [p.text.prompt for p in prompts] == [record["prompt"] for record in records]


def test_each_prompt_comes_once_unless_duplicates_are_wanted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(write_jsonl(tmp_path / "d.jsonl", [{"prompt": name} for name in "ABABCA"]))
    assert [p.row for p in read_prompts(path, tokenizer)] == [1, 2, 5]
    assert [p.row for p in read_prompts(path, tokenizer, limit=2)] == [1, 2]
    assert [p.row for p in read_prompts(path, tokenizer, 4, duplicates=True)] == [1, 2, 3, 4]


def test_what_has_no_prompt_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_prompts(str(tmp_path / "none.jsonl"), tokenizer)
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"d\.jsonl: has no rows; use data"):
        read_prompts(str(path), tokenizer)
    write_jsonl(path, [{"prompt": "A"}, {"question": "B"}])
    with pytest.raises(DataError, match="row 2: no prompt; columns found: question; expected"):
        read_prompts(str(path), tokenizer)
    write_jsonl(path, [{"prompt": 5}])
    with pytest.raises(DataError, match="row 1: prompt must be a list of"):
        read_prompts(str(path), tokenizer)


def test_an_empty_prompt_needs_a_token_to_begin_with(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(write_jsonl(tmp_path / "d.jsonl", [{"prompt": ""}]))
    assert read_prompts(path, tokenizer)[0].ids.tolist() == [tokenizer.bos_token_id]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="a prompt is empty, and the tokenizer has neither"):
        read_prompts(path, bare)
