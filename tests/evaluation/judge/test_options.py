"""Command lines of judge that are refused, each in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.helpers.data import write_jsonl

Command = Callable[..., CompletedProcess[str]]
ENDPOINT = "--endpoint http://127.0.0.1:9/v1"
CHAT = f"{ENDPOINT} --model m"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "judge: needs --endpoint or --reward-model; give one of them"),
        (f"{CHAT} --reward-model x", "judge: needs --endpoint or --reward-model; give one of the"),
        (ENDPOINT, "--model: is needed with --endpoint; name the model that judges"),
        (f"{CHAT} --bradley-terry", "--bradley-terry: is an option of --reward-model; leave it o"),
        (f"{CHAT} --device cpu", "--device: is an option of --reward-model; leave it out"),
        ("--reward-model x --seed 1", "--seed: is an option of --endpoint; leave it out"),
        ("--reward-model x --max-tokens 1", "--max-tokens: is an option of --endpoint; leave it"),
        ("--reward-model x --device tpu", "--device: expected auto, cpu or cuda, got 'tpu'"),
        ("--reward-model x --dtype fp8", "--dtype: expected bfloat16 or float32 or float64, got "),
        ("--reward-model x --batch-size 0", "--batch-size: expected a number >= 1, got 0"),
        ("--reward-model x --device cpu", "--reward-model: cannot load x: "),
        ("--endpoint host:80 --model m", "--endpoint: expected a URL such as http://localhost:800"),
        (f"{CHAT} --temperature -1", "--temperature: expected >= 0, got -1.0"),
        (f"{CHAT} --temperature nan", "--temperature: expected >= 0, got nan"),
        (f"{CHAT} --max-tokens 0", "--max-tokens: expected a number >= 1, got 0"),
        (f"{CHAT} --workers 0", "--workers: expected 1 to 256, got 0"),
        (f"{CHAT} --timeout 0", "--timeout: expected seconds > 0, got 0.0"),
        (f"{CHAT} --retries -1", "--retries: expected a number >= 0, got -1"),
        (f"{CHAT} --api-key-env NO_SUCH", "--api-key-env: the environment variable NO_SUCH is not"),
        (f"{CHAT} --body top_p", "--body: expected FIELD=VALUE such as top_p=0.9, with a field"),
        (f"{CHAT} --body model=x", "--body: expected FIELD=VALUE such as top_p=0.9, with a field"),
        (f"{CHAT} --template nowhere.txt", "--template: cannot read nowhere.txt ("),
        (f"{CHAT} --names one", "--names: expected two names such as new,old, got 'one'"),
        (f"{CHAT} --names one,", "--names: expected two names such as new,old, got 'one,'"),
        (f"{CHAT} --names x,x", "both are of x; name the models with --names"),
        (f"{CHAT} --match row", "--match: expected prompt or id, got 'row'"),
        (f"{CHAT} --prompts nowhere.jsonl", "nowhere.jsonl: no such file; check the path"),
        (f"{CHAT} --cache .", "--cache: . is a folder; name a file"),
        (f"{CHAT} --cache a.jsonl", "--cache: a.jsonl, line 1: not an answer of a judge; remove"),
        (f"{CHAT} --retries 0", "failed 1 times ("),
    ],
)
def test_a_bad_command_line_is_one_line(
    fastpref: Command, tmp_path: Path, line: str, message: str
) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "p", "completion": name}])
    done = fastpref("judge", "a.jsonl", "b.jsonl", *line.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "runs" / "judge" / "judge.json").exists()


def test_files_that_cannot_be_compared(fastpref: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "x"}])
    (tmp_path / "empty.jsonl").write_text("")
    for b, message in {
        "none.jsonl": "none.jsonl: no such file; check the path",
        "empty.jsonl": "empty.jsonl: the file is empty; name one with rows",
        "a.jsonl": "a.jsonl and a.jsonl: both are of a; name the models with --names",
    }.items():
        done = fastpref("judge", "a.jsonl", b, *CHAT.split(), cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
