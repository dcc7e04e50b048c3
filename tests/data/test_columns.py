"""Columns under other names, and margins of pairs on their way into a batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.collate import collate
from fastpref.data.dataset import load_groups
from fastpref.data.formats import to_groups
from fastpref.data.readers import DataError, read_rows, rename
from fastpref.data.sft import row_kind
from fastpref.data.sources import load_data
from fastpref.losses import build
from tests.helpers.data import rows, write_jsonl

MAPPING = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}


def renamed(count: int) -> list[dict[str, Any]]:
    return [{MAPPING.get(name, name): row[name] for name in row} for row in rows(count)]


@pytest.mark.parametrize(
    ("mapping", "row", "expected"),
    [
        ({"prompt": "q"}, {"q": 1, "x": 2}, {"prompt": 1, "x": 2}),
        ({"prompt": "q"}, {"q": 1, "prompt": 2}, {"prompt": 1}),
        ({"chosen": "rejected", "rejected": "chosen"}, {"chosen": 1, "rejected": 2},
         {"chosen": 2, "rejected": 1}),
        ({"prompt": "q", "chosen": "q"}, {"q": 1}, {"prompt": 1, "chosen": 1}),
        ({"prompt": "q", "p": "agreement"}, {"q": 1, "p": 2}, {"prompt": 1}),
        ({"chosen": "chosen"}, {"chosen": 1}, {"chosen": 1}),
    ],
)  # fmt: skip
def test_a_row_has_the_names_of_the_mapping(
    mapping: dict[str, str], row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert rename(row, mapping) == expected


def test_renamed_data_gives_the_tokens_of_data_with_our_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    ours = write_jsonl(tmp_path / "a.jsonl", rows(4))
    theirs = write_jsonl(tmp_path / "b.jsonl", renamed(4))
    cache = str(tmp_path / "cache")
    expected = load_groups(str(ours), tokenizer, Data(train=str(ours), cache=cache))
    options: list[dict[str, Any]] = [
        {"train": str(theirs), "columns": MAPPING},
        {"train": [{"path": str(theirs), "columns": MAPPING}]},
    ]
    for values in options:
        data = Data(**values, cache=cache)
        groups = load_data(data, "train", tokenizer)
        assert [groups[k].prompt.tolist() for k in range(4)] == [
            expected[k].prompt.tolist() for k in range(4)
        ]


def test_a_column_that_no_row_has_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "Q", "a": "A"}, {"q": "Q", "b": "B"}])
    says = f"data.columns.prompt: {path} has no column question; use one of q, a, b"
    with pytest.raises(DataError, match=f"^{re.escape(says)}$"):
        list(read_rows(str(path), columns={"prompt": "question"}))
    # A later row may have a column that the first lacks.
    assert [row for _, row in read_rows(str(path), columns={"p": "b"})] == [
        {"q": "Q", "a": "A"},
        {"p": "B", "q": "Q"},
    ]


def test_rows_of_sft_are_known_by_their_renamed_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "Q", "good": "A", "bad": "B"}])
    pairs = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert row_kind(build("sft"), Data(train=str(path), columns=pairs)) == "pairwise"
    single = {"prompt": "q", "completion": "good"}
    assert row_kind(build("sft"), Data(train=str(path), columns=single)) == "sft"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"chosn": "a"}, "chosn is no column of fastpref; use one of chosen"),
        ({"question": "prompt"}, "rejected_weights; the name of the data set comes second"),
    ],
)
def test_a_name_that_fastpref_does_not_read(columns: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Data(train="x", columns=columns)


def test_margins_come_into_the_batch_in_the_order_of_its_pairs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = [{**row, "margin": k / 2} for k, row in enumerate(rows(4))]
    path = write_jsonl(tmp_path / "d.jsonl", made)
    data = Data(train=str(path), cache=str(tmp_path / "cache"))
    groups = load_groups(str(path), tokenizer, data)
    assert groups.without_margin == 0
    for layout in ("padded", "prefix_shared"):
        batch = collate([groups[k] for k in (2, 0, 3)], layout=layout)
        assert batch.margins is not None and batch.margins.tolist() == [1.0, 0.0, 1.5]
        view = batch.view(batch.lengths.float())
        assert view.margin.tolist() == [1.0, 0.0, 1.5]  # type: ignore[union-attr]


def test_margins_that_some_pairs_lack_are_in_no_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = [{**row, "margin": None if k else 1.0} for k, row in enumerate(rows(3))]
    path = write_jsonl(tmp_path / "d.jsonl", made)
    groups = load_groups(str(path), tokenizer, Data(train=str(path), cache=str(tmp_path / "cache")))
    assert groups.without_margin == 2
    assert collate([groups[0]]).margins is None


def test_a_margin_is_a_number_and_pointwise_objectives_leave_it_out() -> None:
    row = {"prompt": "Q", "chosen": " a", "rejected": " b", "margin": "1"}
    with pytest.raises(DataError, match="margin must be a finite number, got '1'"):
        to_groups(row)
    assert [group.margin for group in to_groups({**row, "margin": 1}, "pointwise")] == [None, None]


def test_a_byte_order_mark_is_no_part_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('\n[\n{"prompt": "Q"}]', encoding="utf-8-sig")
    assert [row for _, row in read_rows(str(path))] == [{"prompt": "Q"}]
    (tmp_path / "d.jsonl").write_text('{"prompt": "Q"}\n', encoding="utf-8-sig")
    assert [row for _, row in read_rows(str(tmp_path / "d.jsonl"))] == [{"prompt": "Q"}]
