"""Nested rows give the same tokens from JSON lines, Parquet and Arrow."""

from __future__ import annotations

import datetime
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.nested import Unifier
from fastpref.data.readers import DataError, read_rows
from fastpref.data.sft import read_rows_of
from fastpref.data.tokenize import tokenize
from tests.helpers.data import WORDS, write_jsonl

Rows = list[dict[str, Any]]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A type of value for each name, as a column of a table has only one; None is one of every type.
ARGUMENTS: dict[str, Callable[[random.Random], Any]] = {
    "city": lambda draw: draw.choice([*WORDS, None]),
    "days": lambda draw: draw.choice([1, 2, 2.5, 7.0, None]),
    "exact": lambda draw: draw.choice([True, False]),
    "tags": lambda draw: draw.sample(WORDS, draw.randint(0, 2)) + [None] * draw.randint(0, 1),
    "near": lambda draw: _some(draw, {"lat": lambda d: d.choice([1, 0.5]), "name": _word}),
    "stops": lambda draw: [_some(draw, {"at": _word, "for": _word}) for _ in range(2)],
}
SCHEMA: dict[str, Callable[[random.Random], Any]] = {
    "type": lambda draw: draw.choice(["string", "integer"]),
    "description": lambda draw: draw.choice([_word(draw), None]),
    "enum": lambda draw: draw.choice([["a", "b"], ["a", None]]),
    "default": lambda draw: None,
}


def _word(draw: random.Random) -> str:
    return draw.choice(WORDS)


def _some(draw: random.Random, kinds: dict[str, Callable[[random.Random], Any]]) -> Any:
    """Some of the keys, one at least, in any order."""
    names = draw.sample(list(kinds), draw.randint(1, len(kinds)))
    return {name: kinds[name](draw) for name in names}


def _call(draw: random.Random) -> dict[str, Any]:
    call = {
        "type": "function",
        "function": {"name": _word(draw), "arguments": _some(draw, ARGUMENTS)},
    }
    return call | ({"id": f"call-{draw.randint(0, 9)}"} if draw.random() < 0.3 else {})


def _answer(draw: random.Random) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": f"{_word(draw)} {_word(draw)}"}
    if draw.random() < 0.5:
        message["tool_calls"] = [_call(draw) for _ in range(draw.randint(1, 2))]
        message["content"] = draw.choice([message["content"], None])
        if message["content"] is None and draw.random() < 0.5:
            del message["content"]
    return message


def _tool(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(list(ARGUMENTS), 2)
    function: dict[str, Any] = {
        "name": _word(draw),
        "parameters": {
            "type": "object",
            "properties": {name: _some(draw, SCHEMA) for name in names},
            "required": draw.sample(names, draw.randint(0, 2)),
        },
    }
    return {"type": "function", "function": {**_some(draw, {"description": _word}), **function}}


def table(seed: int) -> Rows:
    """Pairs of conversations in which every key may be missing, null, or in another place."""
    draw = random.Random(seed)
    repeats = draw.random() < 0.5  # the prompt in the responses
    made: Rows = []
    for number in range(draw.randint(4, 9)):
        prompt: Rows = [{"role": "user", "content": f"{number} {_word(draw)}?"}]
        if draw.random() < 0.3:
            prompt += [_answer(draw), {"role": "tool", "name": _word(draw), "content": "ok"}]
        before = [dict(message) for message in prompt] if repeats else []
        row: dict[str, Any] = {
            "id": number,
            "prompt": prompt,
            "chosen": [*before, _answer(draw)],
            "rejected": [*before, _answer(draw)],
            "tools": [_tool(draw) for _ in range(draw.randint(1, 2))],
            "margin": draw.choice([0.5, 2]),
            "source": draw.choice([{"name": _word(draw)}, {"url": None, "name": None}]),
        }
        for name in ("id", "tools", "margin", "source"):
            if draw.random() < 0.2:
                del row[name]
        made.append(row)
    return made


def _dataset(rows: Rows) -> datasets.Dataset:
    names = dict.fromkeys(name for row in rows for name in row)
    # `from_list` keeps the columns of the first row only.
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def _arrow(path: Path, rows: Rows) -> Path:
    _dataset(rows).save_to_disk(str(path))
    return next(path.glob("*.arrow"))


def _loaded(path: Path, rows: Rows) -> datasets.Dataset:
    """The rows as `load_dataset` reads them from JSON, with columns of Arrow's JSON type."""
    source = write_jsonl(path.with_suffix(".jsonl"), rows)
    options = {"split": "train", "cache_dir": str(path.with_suffix(""))}
    return datasets.load_dataset("json", data_files=str(source), **options)


def tokens(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    data = Data(train=str(path))
    groups = list(read_rows_of(str(path), "pairwise", data))
    (rows,) = tokenize([groups], str(path), tokenizer, data, "pairwise", Counter())
    assert len(rows) == len(groups)
    return [[ids.tolist() for ids in (row["prompt"], *row["responses"])] for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_gives_the_same_tokens_from_every_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = table(seed)
    expected = tokens(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer)
    paths = [tmp_path / name for name in ("pandas.parquet", "datasets.parquet")]
    pd.DataFrame(rows).to_parquet(paths[0])
    _dataset(rows).to_parquet(str(paths[1]))
    if seed < 4:
        paths += [tmp_path / "json.parquet", _arrow(tmp_path / "saved", rows)]
        _loaded(tmp_path / "loaded", rows).to_parquet(str(paths[2]))
        assert "arrow.json" in str(pq.read_schema(paths[2]))
    for path in paths:
        assert tokens(path, tokenizer) == expected, path.name


def test_the_tokens_are_those_of_the_rows_without_nulls(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """So a row says in a table what it says alone."""
    tokenizer.chat_template = TEMPLATE
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": None, "y": 2.0}}}
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "no", "tool_calls": None}],
    }
    other = {**row, "chosen": [{"role": "assistant", "content": "yes", "name": "x"}]}
    pd.DataFrame([other, row]).to_parquet(tmp_path / "d.parquet")
    _, (_, chosen, rejected) = tokens(tmp_path / "d.parquet", tokenizer)
    text = '[{"type": "function", "function": {"name": "find", "arguments": {"y": 2}}}]'
    assert tokenizer.decode(chosen) == f"{text}<|im_end|>\n"
    assert tokenizer.decode(rejected) == "no<|im_end|>\n"


def test_text_that_holds_json_is_left_as_it_is(tmp_path: Path) -> None:
    tools = json.dumps([{"parameters": {"b": {"default": None}, "a": 1.0}}])
    row = {"prompt": "Q", "chosen": "yes", "rejected": "no", "tools": tools}
    for path in (write_jsonl(tmp_path / "d.jsonl", [row]), tmp_path / "d.parquet"):
        if path.suffix == ".parquet":
            pd.DataFrame([row]).to_parquet(path)
        ((_, group),) = read_rows_of(str(path), "pairwise", Data(train="-"))
        assert json.dumps(group.tools) == tools


def test_nulls_in_lists_and_numbers_that_are_not_whole_stay() -> None:
    row = {"tools": [{"enum": [None, "a"], "x": 0.5, "big": 1e300, "deep": {"y": None}}]}
    assert Unifier().row(row) == {
        "tools": [{"enum": [None, "a"], "x": 0.5, "big": 1e300, "deep": {}}]
    }


def test_other_columns_are_left_as_they_are() -> None:
    row = {"meta": {"a": None, "b": 1.0}, "scores": [1.0, 2.0], "chosen": "text", "margin": 2.0}
    assert json.dumps(Unifier().row(row)) == json.dumps(row)


def test_keys_come_in_the_order_of_their_first_appearance_at_their_place() -> None:
    unifier = Unifier()
    first = {"tools": [{"b": 1, "a": {"y": 1}}], "chosen": [{"role": "x"}]}
    second = {"tools": [{"c": 1, "a": {"x": 1, "y": 2}, "b": 2}], "chosen": [{"a": 1, "role": "y"}]}
    assert json.dumps(unifier.row(first)) == json.dumps(first)
    assert json.dumps(unifier.row(second)) == json.dumps(
        {"tools": [{"b": 2, "a": {"y": 2, "x": 1}, "c": 1}], "chosen": [{"role": "y", "a": 1}]}
    )


def test_maps_are_objects(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.int64())}))
    value = [{"name": "f", "arguments": [("x", 1), ("y", None)]}]
    pq.write_table(pa.table({"tools": pa.array([value], kind)}), tmp_path / "d.parquet")
    ((_, row),) = read_rows(str(tmp_path / "d.parquet"))
    assert row == {"tools": [{"name": "f", "arguments": {"x": 1}}]}


def test_a_column_of_jsons_type_that_holds_none(tmp_path: Path) -> None:
    values = pa.array(["[1", None], pa.json_())
    pq.write_table(pa.table({"tools": values}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="not a readable Parquet file; write it again: "):
        list(read_rows(str(tmp_path / "d.parquet")))


def test_dates_are_refused_since_their_text_is_not_known(tmp_path: Path) -> None:
    row = {"chosen": [{"role": "assistant", "day": datetime.date(2024, 5, 1)}]}
    pd.DataFrame([row]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(
        DataError,
        match="row 1: chosen has a value of type date, and how it was written is not known; store",
    ):
        list(read_rows(str(tmp_path / "d.parquet")))


def test_values_that_are_nested_too_deeply() -> None:
    value: list[Any] = []
    for _ in range(2000):
        value = [value]
    with pytest.raises(ValueError, match=r"^chosen is nested too deeply; store it as text"):
        Unifier().row({"chosen": value})
