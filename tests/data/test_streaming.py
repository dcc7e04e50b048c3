"""Streamed groups: windows, their order, files of all kinds, and rows unlike the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from fastpref import losses
from fastpref.config import Data, Model
from fastpref.data.dataset import load_groups
from fastpref.data.readers import DataError
from fastpref.data.sft import row_kind
from fastpref.data.stream_plan import StreamedPlan, plan_stream
from fastpref.data.streaming import StreamedGroups
from fastpref.data.tokenizers import tokenizer_of
from fastpref.utils.errors import ModelError
from tests.helpers.data import labelled, rows, scored, write_jsonl


def stream(
    source: Path | str,
    tokenizer: PreTrainedTokenizerFast,
    kind: Any = "pairwise",
    batch_size: int = 4,
    **options: Any,
) -> StreamedGroups:
    data = Data(train=str(source), streaming=True, **{"shuffle_window": 8, **options})
    return StreamedGroups(data, tokenizer, kind, batch_size, seed=3)


def plan_of(groups: StreamedGroups, **options: Any) -> StreamedPlan:
    return plan_stream(groups, 4, 4096, 3, "prefix_shared", **options)


def files(folder: Path, records: list[dict[str, Any]], sizes: list[int]) -> Path:
    """Parquet files with these numbers of rows."""
    ends = np.cumsum(sizes)
    for k, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        table = pa.Table.from_pylist(records[end - size : end])
        pq.write_table(table, folder / f"{k}.parquet", row_group_size=4)
    return folder


def text(tokenizer: PreTrainedTokenizerFast, group: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in (group.prompt, *group.responses)]


def test_groups_are_those_of_the_data_set_in_memory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """30 rows in three files: every row once an epoch, files in another order in each."""
    folder = files(tmp_path, rows(30), [11, 7, 12])
    groups = stream(folder, tokenizer)
    plan = plan_of(groups)
    whole = write_jsonl(tmp_path / "whole.json", rows(30))
    expected = load_groups(str(whole), tokenizer, Data(train="-", cache=str(tmp_path / "cache")))
    starts = []
    for epoch in (0, 1, 2):
        seen = []
        for number in range(epoch * 8, (epoch + 1) * 8):
            for part in plan.step(number):
                for index in part:
                    assert text(tokenizer, groups[index]) == text(tokenizer, expected[index])
                    seen.append(index)
        assert sorted(seen) == list(range(30))
        starts.append(sorted(seen[:8]))
    assert len({tuple(start) for start in starts}) > 1
    assert plan.steps_per_epoch == 8 and len(plan.groups(7)) == 2


def test_a_step_depends_on_its_number_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = files(tmp_path, rows(30), [11, 7, 12])
    whole = plan_of(stream(folder, tokenizer))
    steps = [whole.groups(number) for number in range(24)]
    for number in (13, 5, 23, 0):
        assert plan_of(stream(folder, tokenizer)).groups(number) == steps[number]
    ranks = [plan_of(stream(folder, tokenizer), ranks=2, rank=rank) for rank in (0, 1)]
    for number in (0, 7, 9):
        parts = [plan.step(number) for plan in ranks]
        assert len(parts[0]) == len(parts[1])
        assert sorted(i for rank in parts for part in rank for i in part) == sorted(steps[number])


@pytest.mark.parametrize("suffix", ["jsonl", "arrow", "parquet"])
def test_files_of_all_kinds_give_the_same_steps(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str
) -> None:
    path, records = tmp_path / f"d.{suffix}", rows(10)
    table = pa.Table.from_pylist(records)
    if suffix == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    groups = stream(path, tokenizer)
    plan = plan_of(groups)
    texts = [text(tokenizer, groups[i])[0] for number in range(3) for i in plan.groups(number)]
    assert sorted(int(t.split(":")[1].split(".")[0]) for t in texts) == list(range(10))
    assert texts[0].split(".")[0] == "User: 6"


def test_dropped_rows_are_replaced_so_that_steps_are_full(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    records = rows(16)
    for row in records[1:16:3]:
        row["prompt"] *= 40
    groups = stream(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, max_length=64)
    plan = plan_of(groups)
    seen = [index for number in range(4) for index in plan.groups(number)]
    assert len(seen) == 16 and set(seen) == set(range(16)) - set(range(1, 16, 3))
    assert "5 of the first 8 pairs remain" in groups.summary()


def test_pairs_make_two_responses_each(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    groups = stream(write_jsonl(tmp_path / "d.jsonl", rows(8)), tokenizer, "pointwise")
    plan = plan_of(groups)
    assert len(groups) == 16 and plan.steps_per_epoch == 4
    seen = [groups[index] for number in range(4) for index in plan.groups(number)]
    assert sorted(group.index for group in seen) == list(range(16))
    assert all(group.labels == (1.0 - group.index % 2,) for group in seen)
    assert groups.row_names([0, 1, 5]) == [1, 3]


def test_a_row_of_another_form_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*labelled(8), *rows(8)])
    plan = plan_of(stream(path, tokenizer, "pointwise"))
    with pytest.raises(
        DataError,
        match=r"row 9: makes 2 and the first row 1 responses; data.streaming needs rows of "
        r"one form",
    ):
        plan.groups(2)


@pytest.mark.parametrize(
    ("first", "later", "says"),
    [
        (
            {},
            {"p": 0.7},
            "has p, and no row of the first 8 has; give it to one of them, or set "
            "data.soft_labels=false",
        ),
        (
            {},
            {"chosen_weights": [1.0], "rejected_weights": [1.0]},
            "has token weights, and no row of the first 8 has; give them to one of these, or set "
            "data.token_weights=false",
        ),
        (
            {"margin": 1.0},
            {},
            "has no margin, and all rows of the first 8 have one; give it one, or remove the "
            "column",
        ),
    ],
)
def test_annotations_that_begin_or_end_later_are_refused(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    first: dict[str, Any],
    later: dict[str, Any],
    says: str,
) -> None:
    word = {"prompt": "Say it:", "chosen": " tea", "rejected": " tea"}
    count = len(tokenizer(word["prompt"] + word["chosen"])["input_ids"]) - len(
        tokenizer(word["prompt"])["input_ids"]
    )
    later = {
        key: value * count if isinstance(value, list) else value for key, value in later.items()
    }
    records = [{**word, **first}] * 8 + [{**word, **later}] * 8
    groups = stream(write_jsonl(tmp_path / "d.jsonl", records), tokenizer)
    with pytest.raises(DataError) as error:
        for index in plan_of(groups).groups(2):
            groups[index]
    assert str(error.value).endswith(says)


def test_labels_of_some_rows_count_for_all(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    records = rows(16)
    records[2]["p"] = 0.7
    groups = stream(write_jsonl(tmp_path / "d.jsonl", records), tokenizer)
    plan = plan_of(groups)
    labels = {i: groups[i].labels for number in range(4) for i in plan.groups(number)}
    assert groups.has_preferences and labels.pop(2) == (0.7,)
    assert set(labels.values()) == {(1.0,)}


def test_budgets_hold_whatever_max_length_allows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    groups = stream(write_jsonl(tmp_path / "d.jsonl", rows(8)), tokenizer, max_length=64)
    plan_stream(groups, 4, 127, 3, "prefix_shared")
    with pytest.raises(
        DataError,
        match=r"training.micro_batch_tokens: 126 cannot hold the longest pair that data.max_length "
        r"allows \(127 tokens\); raise it, or lower data.max_length",
    ):
        plan_stream(groups, 4, 126, 3, "prefix_shared")
    plan_stream(groups, 4, 128, 3, "padded")


def test_a_larger_group_than_the_first_ones_is_refused_by_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    records = [{"prompt": "Q:", "completions": [" a"], "scores": [1.0]} for _ in range(16)]
    records[11] = {"prompt": "Q:", "completions": [" a b c"] * 40, "scores": [1.0] * 40}
    path = write_jsonl(tmp_path / "d.jsonl", records)
    groups = stream(path, tokenizer, "groupwise", max_length=16)
    plan = plan_stream(groups, 4, 16, 3, "prefix_shared")
    with pytest.raises(
        DataError,
        match=r"row 12: a group of .* tokens is more than a micro-batch holds, 16; raise "
        r"training.micro_batch_tokens",
    ):
        for number in (2, 3):
            plan.step(number)


def test_sources_without_files_or_rows_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for source in (
        tmp_path / "empty",
        tmp_path / "*.parquet",
        write_jsonl(tmp_path / "a.json", []),
    ):
        with pytest.raises(
            DataError,
            match=r"data.streaming reads files that end in .parquet, .jsonl, .arrow, and .* is "
            r"none; name a file, a folder or a pattern of them",
        ):
            stream(source, tokenizer)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank.jsonl: has no rows; name files with rows"):
        stream(tmp_path / "blank.jsonl", tokenizer)
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(DataError, match=r"broken.parquet: cannot count its rows; write it again: "):
        stream(tmp_path / "broken.parquet", tokenizer)
    long = write_jsonl(tmp_path / "long.jsonl", rows(8))
    with pytest.raises(
        DataError, match=r"none of 8 successive rows has a response left; raise data.max_length or"
    ):
        stream(long, tokenizer, max_length=2)


def test_a_file_that_has_lost_rows_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", rows(24))
    groups = stream(path, tokenizer)
    before = groups.fingerprint
    write_jsonl(path, rows(10))
    with pytest.raises(
        DataError, match=r"has fewer rows than it had when the run began; restore it"
    ):
        for number in (6, 8):  # of the second epoch, for which the file is read again
            plan_of(groups).groups(number)
    assert stream(path, tokenizer).fingerprint != before


def test_rows_decide_their_kind_and_no_tokenizer_is_trained(tmp_path: Path) -> None:
    folder = files(tmp_path, [{"prompt": "a", "completion": "b"}] * 4, [2, 2])
    data = Data(train=str(folder), streaming=True)
    assert row_kind(losses.build("sft"), data) == "sft"
    assert row_kind(losses.build("nca"), data) == "groupwise"
    model = Model(init="random", config={"model_type": "llama", "vocab_size": 300})
    with pytest.raises(
        ModelError,
        match=r"model.tokenizer: is needed with data.streaming, since none is trained on streamed "
        r"data; name one",
    ):
        tokenizer_of(model, data, "sft")


def test_a_hub_data_set_is_read_while_it_is_downloaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    folder, load = files(tmp_path, scored(12), [6, 6]), datasets.load_dataset

    def local(name: str, split: str, streaming: bool = False) -> Any:
        assert (name, split, streaming) == ("org/name", "train_prefs", True)
        found = load("parquet", data_files=str(folder / "*"), split="train", streaming=True)
        found.info.splits = {"train_prefs": datasets.SplitInfo("train_prefs", num_examples=count)}
        return found

    class Api:
        def dataset_info(self, name: str) -> Any:
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    count: int | None = 12
    groups = stream("org/name:train_prefs", tokenizer, "groupwise", max_length=64)
    plan = plan_of(groups)
    assert sorted(i for number in range(3) for i in plan.groups(number)) == list(range(12))
    assert len(groups[plan.groups(1)[0]].responses) >= 1
    count = None
    with pytest.raises(
        DataError,
        match=r"the Hub does not say how many rows it has, which data.streaming needs; download "
        r"its files, and name their folder",
    ):
        stream("org/name:train_prefs", tokenizer, "groupwise")
