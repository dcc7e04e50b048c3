"""`fastpref data show`: rows as they are trained, in a terminal and on a page."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Command = Callable[..., subprocess.CompletedProcess[str]]
LONG = "one two three four five six seven eight nine ten eleven twelve"
ROWS = [
    {"prompt": "Q:", "chosen": " a", "rejected": " b \x1b[31m<b>", "p": 0.75},
    {"prompt": "Q:", "chosen": f" {LONG}", "rejected": " b"},
    {"prompt": LONG, "chosen": " a", "rejected": " b"},
    {"prompt": "Q:", "chosen": " a"},
]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: str) -> Path:
    """Folder with rows.jsonl and c.yaml."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values: dict[str, Any] = {
        "model": {"path": tiny_llama},
        "data": {"train": "rows.jsonl", "max_length": 24},
        "loss": "dpo",
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_rows_in_a_terminal(fastpref: Command, folder: Path) -> None:
    done = fastpref("data", "show", "--config", "c.yaml", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third, fourth, summary = done.stdout.rstrip("\n").split("\n\n")
    assert re.fullmatch(
        r"row 1: prompt 2 tokens; chosen \d tokens; rejected \d+ tokens; p 0\.75\n"
        r"prompt\nQ:\nchosen\n a</s>\nrejected\n b \\x1b\[31m<b></s>",
        first,
    )
    assert re.match(r"row 2: prompt 2 tokens; chosen 22 tokens, \d+ cut; rejected 3 tokens", second)
    kept, cut = re.search(r"chosen\n (.*)\[left out: (.*)\]\nrejected\n b</s>", second).groups()  # type: ignore[union-attr]
    assert kept + cut == f"{LONG}</s>" and kept and cut
    assert third.startswith("row 3: dropped, no token of a response that is trained on is left")
    assert f"prompt\n[left out: {LONG}]\n" in third
    assert fourth.startswith("row 4: stops the run\nno rejected; columns found: prompt, chosen")
    assert summary == "4 rows of rows.jsonl: 1 cut, 1 dropped, 1 with errors, which stop the run"


def test_colors_are_for_terminals(
    fastpref: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("data", "show", "rows.jsonl", "--config", "c.yaml", "--rows", "1")
    assert "\x1b" not in fastpref(*arguments, cwd=folder).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = fastpref(*arguments, cwd=folder).stdout
    assert "\x1b[36mQ:\x1b[0m" in colored and "\x1b[32m a</s>\x1b[0m" in colored
    assert "row 2" not in colored


def test_a_page(fastpref: Command, folder: Path) -> None:
    done = fastpref("data", "show", "c.yaml", "--html", "rows.html", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "page: rows.html\n")
    page = (folder / "rows.html").read_text("utf-8")
    assert '<mark class="prompt" title="prompt, 2 tokens">Q:</mark>' in page
    assert " b \\x1b[31m&lt;b&gt;&lt;/s&gt;</mark>" in page
    assert len(re.findall('<mark class="cut" title="left out, ', page)) == 4
    assert '<h2 class="problem">row 4: stops the run</h2>' in page
    assert not re.search(r"https?://|<script|src=", page)


def test_the_config_can_be_changed_and_sources_have_their_own_columns(
    fastpref: Command, folder: Path
) -> None:
    (folder / "other.jsonl").write_text('{"q": "Q:", "chosen": " c", "rejected": " d"}\n')
    values = yaml.safe_load((folder / "c.yaml").read_text())
    values["data"]["train"] = ["rows.jsonl", {"path": "other.jsonl", "columns": {"prompt": "q"}}]
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    done = fastpref(
        "data", "show", "--config", "c.yaml", "data.max_length=64", "--rows", "2", cwd=folder
    )
    assert "2 rows of rows.jsonl\n" in done.stdout
    assert done.stdout.endswith(
        "prompt\nQ:\nchosen\n c</s>\nrejected\n d</s>\n\n1 row of other.jsonl\n"
    )
    alone = fastpref("data", "show", "other.jsonl", "--config", "c.yaml", cwd=folder)
    assert alone.stdout in done.stdout


def test_the_first_file_of_a_folder_that_is_streamed(fastpref: Command, folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "rows.jsonl").rename(folder / "shards" / "0.jsonl")
    options = ("data.train=shards", "data.streaming=true", "reference=frozen", "data.max_length=64")
    done = fastpref("data", "show", "--config", "c.yaml", *options, "--rows", "1", cwd=folder)
    assert done.stdout.startswith("row 1: prompt 2 tokens; "), done.stderr
    assert done.stdout.endswith("1 row of shards\n")


def test_rows_behind_a_line_that_is_no_json(fastpref: Command, folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write("{\n")
    done = fastpref("data", "show", "--config", "c.yaml", cwd=folder)
    assert "row 5: stops the run\nrows.jsonl, line 5: not valid JSON; " in done.stdout


def test_assistant_messages_of_a_conversation(fastpref: Command, folder: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    options = ("loss=sft", "data.sft_on=assistant", "data.max_length=99")
    done = fastpref("data", "show", "--config", "c.yaml", *options, cwd=folder)
    assert (
        "response\nb<|im_end|>\n[not trained on: <|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n]d<|im_end|>\n\n" in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--config: is missing; name the config that the data is trained with"),
        (
            ("a", "b", "--config", "c.yaml"),
            "FILE: takes one file, got a and b; run it for each",
        ),
        (("none.jsonl", "--config", "c.yaml"), "none.jsonl: no such file; check the path"),
        (
            ("--config", "c.yaml", "data.columns.prompt=question"),
            "data.columns.prompt: rows.jsonl has no column question; use one of prompt, chosen, "
            "rejected, p",
        ),
    ],
)
def test_what_cannot_be_shown(
    fastpref: Command, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = fastpref("data", "show", *arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (2, f"error: {says}\n")
