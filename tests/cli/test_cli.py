"""The command line as a person meets it: output, messages, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref import losses
from fastpref.config import Config
from fastpref.docgen.config import rows as fields

Command = Callable[..., subprocess.CompletedProcess[str]]


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastpref", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "200"},
    )


def test_version() -> None:
    done = in_a_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fastpref 0.1.0\n", "")


def test_train_help_lists_every_field(fastpref: Command) -> None:
    done = fastpref("train", "--help")
    assert done.returncode == 0
    for field in fields():
        assert f"\n{field.path}  (" in done.stdout
        assert field.description.split()[0] in done.stdout


def test_losses(fastpref: Command) -> None:
    done = fastpref("losses")
    assert done.returncode == 0
    for name in losses.names():
        assert f" {name} " in done.stdout


def test_pure_semantic(fastpref: Command, tmp_path: Path) -> None:
    done = fastpref("data", "pure-semantic", "--out", str(tmp_path / "d"))
    assert done.returncode == 0
    written = [Path(line) for line in done.stdout.split()]
    assert [path.name for path in written] == ["train.jsonl", "test.jsonl"]
    assert sum(len(path.read_text().splitlines()) for path in written) > 2000


def test_dry_run_prints_the_whole_config(
    fastpref: Command, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(make_config().to_yaml())
    done = fastpref("train", str(path), "optim.lr=1e-5", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "lr: 1.0e-05" in done.stdout and "micro_batch_tokens: 4096" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_rounds_prints_the_config_alone(fastpref: Command, tmp_path: Path) -> None:
    config = """
model: {path: missing/model}
data: {train: missing.jsonl}
loss: {name: dpo}
optim: {lr: 1.0e-6}
training: {output: run}
rounds: {scorer: {function: 'rules:score'}}
"""
    (tmp_path / "c.yaml").write_text(config)
    done = fastpref("rounds", str(tmp_path / "c.yaml"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model:") and "train: missing.jsonl" in done.stdout
    assert done.stderr.startswith("note: training.output")
    done = fastpref("rounds", str(tmp_path / "c.yaml"), cwd=tmp_path)
    assert done.returncode == 2 and "model.path: cannot load missing/model" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "error: optim.lr: must be > 0, got -1"),
        ("data.train=missing.jsonl", "error: missing.jsonl: no such file"),
        ("model.path=missing/model", "error: model.path: cannot load missing/model"),
        (
            "training.micro_batch_tokens=10",
            "error: training.micro_batch_tokens: 10 cannot hold the longest pair",
        ),
        ("training.device=cuda", "error: training.device: cuda is asked for"),
        ("resume=elsewhere", "error: resume: elsewhere is not a checkpoint folder"),
        ("training.output_dir=/proc/no", "error: training.output_dir: /proc/no: "),
        ("data.cache=/dev/null/x", "error: data.cache: /dev/null/x: Not a directory; choose"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_exit_code_two(
    fastpref: Command,
    make_config: Callable[..., Config],
    tmp_path: Path,
    override: str,
    message: str,
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(make_config().to_yaml())
    done = fastpref("train", str(path), override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_missing_config(fastpref: Command) -> None:
    done = fastpref("train", "none.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.yaml: cannot read the config")


def test_a_whole_run_prints_plain_lines(make_config: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(make_config().to_yaml())
    done = in_a_process("train", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for part in ("12 of 12 pairs", "step 1/3  loss 0.6931  margin +0.000", "tok/s", "left"):
        assert part in done.stdout
    assert done.stdout.rstrip().endswith("run/model")


def test_the_demo_leaves_other_folders_alone(fastpref: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = fastpref("demo", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty and holds no demo" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
