"""Files of preference data: what is held out, discarded, counted and written."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import parse
from fastpref.data.formats import read_groups
from fastpref.data.pair_files import Job, write_pairs
from fastpref.data.pairs import Recipe
from fastpref.data.readers import DataError, read_rows
from fastpref.losses import Kind
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import LLAMA, write_jsonl
from tests.helpers.scored import completion, groups, ultrafeedback

USER = [{"role": "user", "content": "Q?"}]


def job(folder: Path, rows: list[dict[str, Any]], out: str = "p.jsonl", **options: Any) -> Job:
    names = [name for name in options if name in Recipe.__dataclass_fields__]
    recipe = Recipe(**{name: options.pop(name) for name in names})
    source = write_jsonl(folder / "source.jsonl", rows)
    return Job(str(source), folder / out, recipe, **options)


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path))]


def test_pairs_and_their_summary(tmp_path: Path) -> None:
    rows = [
        {"prompt": "P", "completions": [" good", " bad!!"], "scores": [2, 1]},
        {"prompt": "P ", "completions": [" yes, indeed", " no"], "scores": [4, 1]},
        {"prompt": "Q", "completions": [" a", " b"], "scores": [1, 1]},
        {"prompt": "R", "completions": [" a", " b"], "scores": [1, None]},
    ]
    summary = write_pairs(job(tmp_path, rows, build="best-worst"))
    assert read(tmp_path / "p.jsonl") == [
        {"prompt": "P", "chosen": " good", "rejected": " bad!!",
         "score_chosen": 2.0, "score_rejected": 1.0},
        {"prompt": "P ", "chosen": " yes, indeed", "rejected": " no",
         "score_chosen": 4.0, "score_rejected": 1.0},
    ]  # fmt: skip
    assert summary["groups"] == {
        "read": 4,
        "used": 2,
        "left_out": {"equal scores": 1, "a completion without a score": 1},
    }
    assert summary["prompts"] == {"distinct": 1, "repeated": 1}
    assert summary["rows"] == {"unit": "pair", "train": 2, "eval": 0, "discarded": 0}
    assert summary["score_gap"] == {"mean": 2.0, "median": 2.0, "smallest": 1.0, "largest": 3.0}
    assert summary["characters"] == {"chosen": 8.5, "rejected": 4.5, "chosen_longer": 0.5}
    assert json.loads((tmp_path / "p.summary.json").read_text()) == summary
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "p.jsonl", "p.summary.json", "source.jsonl"
    ]  # fmt: skip


def test_ultrafeedback_becomes_messages(tmp_path: Path) -> None:
    rows = [ultrafeedback("Q?", completion("a", 8, 3), completion("b", 7, 4))]
    for score, chosen in (("overall", "a"), ("mean", "b")):
        made = job(tmp_path, rows, f"{score}.jsonl", score=score)
        assert write_pairs(made)["score"] == score
        (row,) = read(made.out)
        assert row["prompt"] == USER
        assert row["chosen"] == [{"role": "assistant", "content": chosen}]
    write_pairs(job(tmp_path, rows, "text.jsonl", form="text"))
    assert read(tmp_path / "text.jsonl")[0]["prompt"] == "Q?"


@pytest.mark.parametrize(
    ("build", "kind", "count"),
    [
        ("best-random", "pairwise", 12),
        ("best-worst", "pairwise", 12),
        ("all-pairs", "pairwise", 72),
        ("k-responses", "groupwise", 12),
        ("binary", "pointwise", 24),
    ],
)
@pytest.mark.parametrize("form", [None, "messages"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_trainer_reads_every_build(
    tmp_path: Path, build: str, kind: Kind, count: int, form: str | None, suffix: str
) -> None:
    write_pairs(job(tmp_path, groups(12), f"p.{suffix}", build=build, form=form))
    rows = [group for _, group in read_groups(str(tmp_path / f"p.{suffix}"), kind)]
    assert len(rows) == count
    write_pairs(job(tmp_path, groups(12), "other.jsonl", build=build, form=form))
    assert rows == [group for _, group in read_groups(str(tmp_path / "other.jsonl"), kind)]


def test_prompts_are_held_out_with_all_their_rows(tmp_path: Path) -> None:
    rows = [
        {**group, "prompt": f"Q {i % 10}" + " " * (i // 10)} for i, group in enumerate(groups(30))
    ]
    summary = write_pairs(job(tmp_path, rows, build="all-pairs", held_out=20))
    train, held_out = (
        {row["prompt"].strip() for row in read(tmp_path / name)}
        for name in ("p.jsonl", "p.eval.jsonl")
    )
    assert (len(train), len(held_out)) == (8, 2) and not train & held_out
    # A prompt has three rows with six pairs each.
    assert summary["rows"] == {"unit": "pair", "train": 144, "eval": 36, "discarded": 0}
    assert summary["prompts"] == {"distinct": 10, "repeated": 20}


def test_the_order_of_the_file_only_orders_the_result(tmp_path: Path) -> None:
    rows = groups(40)
    options = {"held_out": 10, "build": "binary", "keep_desired": 0.3}
    write_pairs(job(tmp_path, rows, "a.jsonl", **options))
    random.Random(0).shuffle(rows)
    write_pairs(job(tmp_path, rows, "b.jsonl", **options))
    for suffix in ("", ".eval"):
        first, second = (read(tmp_path / f"{name}{suffix}.jsonl") for name in "ab")
        assert first != second
        assert sorted(map(str, first)) == sorted(map(str, second))
    write_pairs(job(tmp_path, rows, "c.jsonl", seed=1, **options))
    assert sorted(map(str, read(tmp_path / "c.jsonl"))) != sorted(map(str, second))


def test_one_percent_of_a_class(tmp_path: Path) -> None:
    """Section 5.3 of arXiv:2505.23316: 99 % of one class are discarded, the other stays whole."""
    rows = [{"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(320)]
    summary = write_pairs(job(tmp_path, rows, build="binary", keep_desired=0.01, held_out=40))
    labels = [row["label"] for row in read(tmp_path / "p.jsonl")]
    assert (labels.count(True), labels.count(False)) == (3, 300)
    assert summary["labels"] == {"desired": 3, "undesired": 300}
    assert summary["rows"] == {"unit": "response", "train": 303, "eval": 40, "discarded": 297}
    assert [row["label"] for row in read(tmp_path / "p.eval.jsonl")] == [True, False] * 20


def test_a_smaller_share_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    kept = []
    for share in (0.1, 0.5):
        write_pairs(
            job(tmp_path, groups(40), f"{share}.jsonl", build="binary", keep_undesired=share)
        )
        rows = read(tmp_path / f"{share}.jsonl")
        kept.append({row["prompt"] for row in rows if not row["label"]})
    assert (len(kept[0]), len(kept[1])) == (4, 20) and kept[0] < kept[1]


def test_parquet_keeps_tools_and_refuses_what_it_would_drop(tmp_path: Path) -> None:
    tools = [{"name": "kettle"}]
    row = {"prompt": USER, "completions": [[{"role": "assistant", "content": c}] for c in "ab"]}
    row |= {"scores": [1, 0], "tools": tools, "chat_template_kwargs": {"think": False}}
    write_pairs(job(tmp_path, [row, {**row, "tools": None}], "p.parquet"))
    with_tools, without = (group for _, group in read_groups(str(tmp_path / "p.parquet")))
    assert (with_tools.tools, without.tools) == (tools, None)
    assert with_tools.chat_template_kwargs == {"think": False}
    called = [{"role": "assistant", "content": "", "tool_calls": [{}]}, row["completions"][0][0]]
    odd = {**row, "completions": [called, row["completions"][1]]}
    with pytest.raises(UserError, match="--out: messages with tool_calls do not fit into Parquet"):
        write_pairs(job(tmp_path, [row, odd], "q.parquet"))
    with pytest.raises(UserError, match="the rows differ in more than Parquet can hold; write a"):
        write_pairs(job(tmp_path, [row, *groups(1)], "q.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "p.parquet", "p.summary.json", "source.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"build": "best"}, "--build: expected one of best-random, best-worst, .*, got best"),
        ({"form": "chat"}, "--form: expected one of text, messages, got chat"),
        ({"k": 1}, "--k: expected at least 2, got 1"),
        ({"min_gap": -1}, "--min-gap: expected a number >= 0, got -1"),
        ({"min_gap": float("nan")}, "--min-gap: expected a number >= 0, got nan"),
        ({"keep_desired": 0, "build": "binary"}, "--keep-desired: expected a share > 0 and <= 1"),
        ({"keep_undesired": 2.0}, "--keep-undesired: expected a share > 0 and <= 1, got 2.0"),
        ({"keep_desired": 0.5}, "--keep-desired: only --build binary has labels; leave it out"),
        ({"keep_desired": 0.01, "build": "binary"},
         "--keep-desired: 0.01 of 8 responses is none; use a larger share"),
        ({"held_out": 9}, "--eval: 9 leaves none of 8 rows; use fewer"),
        ({"out": "p.json"}, r"--out: expected a file .jsonl or .parquet, got .*p.json"),
        ({"out": "source.jsonl"}, r"--out: .*source.jsonl is already there; choose another file"),
    ],
)  # fmt: skip
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_pairs(job(tmp_path, groups(8), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def test_no_group_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no group of completions is left \(equal scores: 3\); lo"):
        write_pairs(job(tmp_path, [{**group, "scores": [1] * 4} for group in groups(3)]))


def test_pairs_need_no_building(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has pairs already; use --build binary, or train on it"):
        write_pairs(job(tmp_path, [{"prompt": "Q", "chosen": "a", "rejected": "b"}]))


@pytest.mark.parametrize(
    ("build", "loss"), [("best-random", "dpo"), ("binary", "pro_b"), ("k-responses", "nca")]
)
def test_real_completions_are_built_and_trained_on(
    build: str, loss: str, real_data: Path, tmp_path: Path, display: Display
) -> None:
    lines = (real_data / "alpacaeval_scalar.jsonl").read_text().splitlines(keepends=True)[:24]
    (tmp_path / "s.jsonl").write_text("".join(lines))
    recipe = Recipe(build)  # type: ignore[arg-type]
    summary = write_pairs(Job(str(tmp_path / "s.jsonl"), tmp_path / "p.jsonl", recipe, held_out=4))
    assert summary["groups"]["used"] == 24
    values: dict[str, Any] = {
        "model": {"init": "random", "dtype": "float32", "config": {**LLAMA, "vocab_size": 512}},
        "data": {"train": str(tmp_path / "p.jsonl"), "eval": str(tmp_path / "p.eval.jsonl")},
        "loss": loss,
        "training": {"steps": 2, "batch_size": 4, "output_dir": str(tmp_path / "run")},
    }
    values["data"] |= {"max_length": 96, "cache": str(tmp_path / "cache")}
    trainer = Trainer(parse(values), display)
    trainer.loop([])
    assert trainer.step == 2


KILLED = """
import os, sys
from pathlib import Path
from fastpref.data.pair_files import Job, write_pairs

rename, remaining = os.replace, [int(sys.argv[1])]

def replace(*paths):
    remaining[0] -= 1
    if remaining[0] < 0:
        os._exit(9)
    rename(*paths)

os.replace = replace
write_pairs(Job("source.jsonl", Path("p.jsonl"), held_out=3))
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_command_killed_at_a_rename_leaves_complete_files_and_no_summary(
    tmp_path: Path, renames: int
) -> None:
    write_jsonl(tmp_path / "source.jsonl", groups(8))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(renames)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 9
    names = ["p.eval.jsonl", "p.jsonl"][:renames]
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == [*names, "source.jsonl"]
    assert [len(read(tmp_path / name)) for name in names] == [3, 5][:renames]
