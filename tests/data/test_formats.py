"""Rows of every accepted format, and the errors for invalid rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.data.formats import TextGroup, common_prefix, read_groups, to_groups
from fastpref.data.readers import DataError, read_rows

ROW = {"prompt": "Q?", "chosen": " yes", "rejected": " no", "p": 0.75}
USER = {"role": "user", "content": "Q?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def to_pair(row: dict[str, Any]) -> TextGroup:
    (pair,) = to_groups(row)
    return pair


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
    pairs = list(read_groups(str(path)))
    assert [number for number, _ in pairs] == [1, 2]
    assert pairs[0][1].labels == (0.75,) and pairs[1][1].labels is None
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
    assert (pair.prompt, *pair.responses) == (shared, " It is x.", " It is y.")


def test_the_prompt_of_other_text_ends_between_words() -> None:
    pair = to_pair({"chosen": "We like cats here", "rejected": "We like cattle"})
    assert (pair.prompt, *pair.responses) == ("We like", " cats here", " cattle")
    assert to_pair({"chosen": "abc", "rejected": "abd"}).prompt == ""


def test_conversations() -> None:
    explicit = to_pair({"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    implicit = to_pair({"chosen": [USER, YES], "rejected": [USER, NO]})
    repeated = to_pair({"prompt": "Q?", "chosen": [USER, YES], "rejected": [USER, NO]})
    plain_prompt = to_pair({"prompt": "Q?", "chosen": [YES], "rejected": [NO]})
    assert explicit == implicit == repeated == plain_prompt
    assert (explicit.prompt, explicit.responses[0]) == ([USER], [YES])
    assert to_pair({"chosen": [USER, YES], "rejected": [USER, YES]}).responses[0] == [YES]


def test_tools_are_passed_on() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    assert to_pair({**row, "tools": tools}).tools == tools
    assert to_pair({**row, "tools": json.dumps(tools)}).tools == tools


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "no chosen; columns found: prompt, chosen, rejected, p; formats"),
        (
            {"chosen": 3},
            "chosen and rejected must be text, or be lists of messages, all alike, got int and",
        ),
        (
            {"chosen": [YES]},
            "must be text, or be lists of messages, all alike, got a list and text",
        ),
        ({"prompt": [USER]}, "prompt must be text like chosen and rejected, got a list"),
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
        list(read_groups(str(path)))
    assert f"{path}, row 2: " in str(caught.value)


LABELED = {"prompt": "Q?", "completion": " yes", "label": True}
SCORED = {"prompt": "Q?", "completions": [" a", " b", " c"], "scores": [0.5, 1, -2.0]}


def test_labeled_rows() -> None:
    for label in (True, 1, 1.0):
        groups = to_groups({**LABELED, "label": label}, "pointwise")
        assert groups == [TextGroup("Q?", (" yes",), labels=(1.0,))]
    assert to_groups({**LABELED, "label": 0}, "pointwise")[0].labels == (0.0,)
    chat = {"prompt": [USER], "completion": [YES], "label": False, "tools": "[1]"}
    assert to_groups(chat, "pointwise") == [TextGroup([USER], ([YES],), [1], (0.0,))]
    repeated = {**chat, "completion": [USER, YES]}
    assert to_groups(repeated, "pointwise") == to_groups(chat, "pointwise")


def test_scored_rows() -> None:
    expected = TextGroup("Q?", (" a", " b", " c"), labels=(0.5, 1.0, -2.0))
    assert to_groups(SCORED, "groupwise") == [expected]
    one = {"prompt": "Q?", "completions": [" a"], "scores": [1]}
    assert to_groups(one, "groupwise")[0].responses == (" a",)
    chat = {"prompt": "Q?", "completions": [[YES], [NO]], "scores": [1, 0]}
    assert to_groups(chat, "groupwise") == [TextGroup([USER], ([YES], [NO]), None, (1.0, 0.0))]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize(("kind", "row"), [("pointwise", LABELED), ("groupwise", SCORED)])
def test_every_file_type_holds_every_kind(
    tmp_path: Path, suffix: str, kind: Any, row: dict[str, Any]
) -> None:
    path = write(tmp_path / f"data{suffix}", [row, row])
    expected = [(number, group) for number in (1, 2) for group in to_groups(row, kind)]
    assert list(read_groups(str(path), kind)) == expected


def test_pairs_are_taken_apart_for_pointwise_objectives() -> None:
    row = {**ROW, "p": None, "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    assert to_groups(row, "pointwise") == [
        TextGroup("Q?", (" yes",), labels=(1.0,), reference_logps=(-1.0,)),
        TextGroup("Q?", (" no",), labels=(0.0,), reference_logps=(-2.0,)),
    ]
    chat = to_groups({"chosen": [USER, YES], "rejected": [USER, NO]}, "pointwise")
    assert [group.responses for group in chat] == [([YES],), ([NO],)]
    with pytest.raises(DataError, match=r"do not take p, .* set data.soft_labels=false"):
        to_groups(ROW, "pointwise")
    assert len(to_groups(ROW, "pointwise", soft_labels=False)) == 2


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairwise", LABELED, "no chosen and no rejected; .*this row is for a pointwise ob"),
        ("pairwise", SCORED, "prompt, completions, scores; .*row is for a groupwise objective"),
        ("pointwise", SCORED, "no completion and no label; columns found: prompt, completions, sc"),
        ("groupwise", ROW, "no completions and no scores; .*this row is for a pairwise objective"),
        ("pointwise", {"text": "a"}, "no prompt and no completion and no label; columns found: te"),
        ("pointwise", {**LABELED, "label": None}, "no label; columns found: prompt, completion"),
        ("pointwise", {**LABELED, "label": 0.5}, "label must be true or false, or 1 or 0, got 0"),
        ("pointwise", {**LABELED, "label": "yes"}, "label must be true or false, .*got 'yes'"),
        ("pointwise", {**LABELED, "label": float("nan")}, "label must be .*got nan"),
        ("pointwise", {**LABELED, "completion": 3}, "completion must be text, or .*, got int"),
        ("pointwise", {**LABELED, "prompt": [USER]}, "prompt must be text like completion, got"),
        ("pointwise", {**LABELED, "completion": [USER]}, "completion must go on from the prompt"),
        ("groupwise", {**SCORED, "scores": [1, 2]}, "of the same length, at least 1, got 3 and 2"),
        ("groupwise", {**SCORED, "completions": [], "scores": []}, "at least 1, got 0 and 0"),
        ("groupwise", {**SCORED, "scores": 1.0}, "scores must be a list, got float"),
        ("groupwise", {**SCORED, "completions": "a"}, "completions must be a list, got text"),
        ("groupwise", {**SCORED, "scores": [1, float("nan"), 2]}, r"scores\[1\] must be .*got nan"),
        ("groupwise", {**SCORED, "scores": [1, None, 2]}, r"scores\[1\] must be .*got None"),
        ("groupwise", {**SCORED, "scores": [1, True, 2]}, r"scores\[1\] must be .*got True"),
        ("groupwise", {**SCORED, "completions": ["a", [YES], "b"]}, "got text and a list"),
        ("groupwise", {**SCORED, "completions": [[YES], [NO], []]}, r"completions\[2\] must go"),
        ("groupwise", {**SCORED, "completions": [[YES], ["x"], [NO]]}, r"completions\[1\] must be"),
        ("groupwise", {**SCORED, "completions": ["a", "b \ud800", "c"]}, r"completions\[1\] is"),
    ],
)  # fmt: skip
def test_a_row_that_is_of_no_or_another_kind(
    tmp_path: Path, kind: Any, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message) as caught:
        list(read_groups(str(path), kind))
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert "\n" not in str(caught.value)


def test_a_missing_column_lists_what_is_there_and_what_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError) as caught:
        list(read_groups(str(path)))
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
        ("d.csv", b"a,b", "unknown file extension; expected .json, .jsonl, .parquet, .arrow"),
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


def test_token_weights_belong_to_both_responses() -> None:
    weights = {"chosen_weights": [1, 0.5], "rejected_weights": [0.0]}
    row = {name: ROW[name] for name in ("prompt", "chosen", "rejected")}
    assert to_groups({**row, **weights})[0].token_weights == ([1.0, 0.5], [0.0])
    assert to_groups({**row, **weights}, token_weights=False)[0].token_weights is None
    with pytest.raises(DataError, match=r"rejected_weights must be a list of numbers >= 0.*None"):
        to_groups({**row, "chosen_weights": [1.0]})
    with pytest.raises(DataError, match=r"chosen_weights must be .* got \[-1\]"):
        to_groups({**row, **weights, "chosen_weights": [-1]}, token_weights=False)
    with pytest.raises(DataError, match=r"do not take chosen_weights.*data.token_weights=false"):
        to_groups({**row, **weights}, "pointwise")
