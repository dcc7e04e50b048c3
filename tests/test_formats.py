"""Rows of every accepted format, and the words in which the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.data.formats import DataError, common_prefix, read_pairs, read_rows, to_pair

ROW = {"prompt": "Q?", "chosen": " yes", "rejected": " no", "p": 0.75}
USER = {"role": "user", "content": "Q?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [ROW, {**ROW, "p": None}])
    pairs = list(read_pairs(str(path)))
    assert [number for number, _ in pairs] == [1, 2]
    assert pairs[0][1].preference == 0.75 and pairs[1][1].preference is None
    assert pairs[0][1].prompt == "Q?"


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n".join(json.dumps(ROW) for _ in range(3)))
    assert len(list(read_rows(str(path)))) == 3


def test_arrow_files_of_the_datasets_library(tmp_path: Path) -> None:
    datasets.Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert next(read_rows(str(path)))[1] == ROW


def test_the_prompt_of_transcripts_ends_at_the_last_shared_assistant_turn() -> None:
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = to_pair({"chosen": f"{shared} It is x.", "rejected": f"{shared} It is y."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, " It is x.", " It is y.")


def test_the_prompt_of_other_text_ends_between_words() -> None:
    pair = to_pair({"chosen": "We like cats here", "rejected": "We like cattle"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("We like", " cats here", " cattle")
    assert to_pair({"chosen": "abc", "rejected": "abd"}).prompt == ""


def test_conversations() -> None:
    explicit = to_pair({"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    implicit = to_pair({"chosen": [USER, YES], "rejected": [USER, NO]})
    repeated = to_pair({"prompt": "Q?", "chosen": [USER, YES], "rejected": [USER, NO]})
    plain_prompt = to_pair({"prompt": "Q?", "chosen": [YES], "rejected": [NO]})
    assert explicit == implicit == repeated == plain_prompt
    assert (explicit.prompt, explicit.chosen) == ([USER], [YES])
    assert to_pair({"chosen": [USER, YES], "rejected": [USER, YES]}).chosen == [YES]


def test_tools_are_passed_on() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    assert to_pair({**row, "tools": tools}).tools == tools
    assert to_pair({**row, "tools": json.dumps(tools)}).tools == tools


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "no chosen; columns found: prompt, chosen, rejected, p; formats"),
        ({"chosen": 3}, "must both be text or both be lists of messages, got int and text"),
        ({"chosen": [YES]}, "must both be text or both be lists of messages"),
        ({"prompt": [USER]}, "prompt is a list of messages but chosen and rejected are text"),
        ({"p": 1.5}, r"p must be a probability in \[0, 1\], got 1.5"),
        ({"p": float("nan")}, "p must be a probability"),
        ({"p": True}, "p must be a probability"),
        ({"chosen": ["x"], "rejected": ["y"]}, "chosen must be a list of {role, content}"),
        ({"chosen": [USER], "rejected": [NO]}, "chosen must go on from the prompt with an assist"),
        ({"chosen": [], "rejected": [NO]}, "chosen must go on from the prompt"),
        ({"ref_chosen_logps": -1.0}, "must both be numbers"),
        ({"chosen": "a \ud800 b"}, "chosen is not valid Unicode at character 2"),
        ({"tools": "{"}, "tools must be a list or its JSON text"),
        ({"tools": 3}, "tools must be a list, got int"),
    ],
)
def test_a_row_that_is_no_pair(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}))
    with pytest.raises(DataError, match=message) as caught:
        list(read_pairs(str(path)))
    assert f"{path}, row 2: " in str(caught.value)


def test_a_missing_column_lists_what_is_there_and_what_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError) as caught:
        list(read_pairs(str(path)))
    for part in ("no chosen and no rejected", "columns found: question, answer", "(prompt implic"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "the file is empty"),
        ("d.jsonl", b"{}\n{oops\n", "line 2: not valid JSON"),
        ("d.jsonl", b"[1, 2]", "row 1: must be an object, got a list"),
        ("d.json", b'[{"a": 1}', "not valid JSON"),
        ("d.json", b"\xff\xfe[", "not valid JSON"),
        ("d.parquet", b"PAR1 broken", "not a readable Parquet file"),
        ("d.arrow", b"ARROW1 broken", "not a readable Arrow file"),
        ("d.csv", b"a,b", "unknown ending; expected .json, .jsonl, .parquet, .arrow"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./none.jsonl", "/no/such/file.json", "a/b/c"])
def test_a_missing_file(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(source))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(str(tmp_path)))


def test_common_prefix() -> None:
    assert common_prefix("abc", "abd", "ab") == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2]) == 2
