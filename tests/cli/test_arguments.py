"""Spellings of arguments that people bring along, and paths with `~` and variables."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastpref.cli.arguments import as_overrides, joined_keys, repeat_grid
from fastpref.utils.errors import UserError
from tests.helpers.report_runs import full, write

Command = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = {"--dry-run": False, "--grid": True, "--help": False, "-h": False}
MINIMAL = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "loss": "dpo"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("c.yaml optim.lr = 1e-5", "c.yaml optim.lr=1e-5"),
        ("c.yaml optim.lr= 1e-5 loss =ipo", "c.yaml optim.lr=1e-5 loss=ipo"),
        ("c.yaml adapter= loss=ipo", "c.yaml adapter= loss=ipo"),
        ("c.yaml adapter= --dry-run", "c.yaml adapter= --dry-run"),
        ("--config c.yaml a.b=1", "c.yaml a.b=1"),
        ("a.b=1 c.yaml", "c.yaml a.b=1"),
        ("--config=c.yaml --dry-run", "c.yaml --dry-run"),
        ("c.yaml --optim.lr 1e-5 --loss=ipo", "c.yaml optim.lr=1e-5 loss=ipo"),
        ("c.yaml --optim.lr = -1", "c.yaml optim.lr=-1"),
        ("c.yaml -o runs/a", "c.yaml training.output_dir=runs/a"),
        ("c.yaml --output_dir=runs/a", "c.yaml training.output_dir=runs/a"),
        ("--resume c.yaml", "c.yaml resume=auto"),
        ("c.yaml --resume", "c.yaml resume=auto"),
        ("c.yaml --resume a.b=1", "c.yaml resume=auto a.b=1"),
        ("c.yaml --resume runs/a/checkpoints/step-5", "c.yaml resume=runs/a/checkpoints/step-5"),
        ("c.yaml --grid a.b=1,2 --dry-run", "c.yaml --grid a.b=1,2 --dry-run"),
    ],
)
def test_other_spellings_of_a_config_and_its_keys(typed: str, meant: str) -> None:
    assert as_overrides(joined_keys(typed.split()), OPTIONS) == meant.split()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--learning_rate 1e-5", "--learning_rate: is an option of other trainers; write optim.lr"),
        ("--group-by-length", "--group-by-length: is an option of other trainers; leave it out: "),
        ("--lr 1", "--lr: is no option; set the key of the config, optim.lr=VALUE"),
        ("--optim.lr", "--optim.lr: has no value; write optim.lr=VALUE"),
        ("--optim.lr --dry-run", "--optim.lr: has no value; write optim.lr=VALUE"),
    ],
)
def test_an_option_that_is_none_names_the_way(typed: str, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        as_overrides(["c.yaml", *typed.split()], OPTIONS)
    assert str(refusal.value).startswith(says)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("c.yaml a=1 --grid b=1,2", "c.yaml a=1 --grid b=1,2"),
        ("c.yaml --grid b=1,2 c=3,4", "c.yaml --grid b=1,2 --grid c=3,4"),
        ("c.yaml --grid=b=1,2 c=3,4", "c.yaml --grid=b=1,2 --grid c=3,4"),
        ("--grid b=1,2 c=3 --dry-run c.yaml d=5", "--grid b=1,2 --grid c=3 --dry-run c.yaml d=5"),
        ("--grid b=1,2 c.yaml d=5", "--grid b=1,2 c.yaml --grid d=5"),
        ("c.yaml --grid b=1,2 --grid c=3,4 d=5", "c.yaml --grid b=1,2 --grid c=3,4 --grid d=5"),
        ("c.yaml --grid", "c.yaml --grid"),
        ("c.yaml a=1 b=2 --profile", "c.yaml a=1 b=2 --profile"),
    ],
)
def test_a_grid_takes_all_values_up_to_the_next_option(typed: str, meant: str) -> None:
    assert repeat_grid(typed.split()) == meant.split()


@pytest.mark.parametrize("line", ["-h", "train -h", "data -h", "report -h"])
def test_a_short_option_for_help(fastpref: Command, line: str) -> None:
    done = fastpref(*line.split())
    assert (done.returncode, done.stderr) == (0, "") and "Usage: " in done.stdout


def test_paths_are_the_same_with_and_without_a_home_and_variables(
    fastpref: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("NAME", "a")

    def resolved(home: str, runs: str) -> str:
        values = {
            "model": {"path": f"{home}/m", "tokenizer": f"{home}/t"},
            "adapter": {"path": f"{home}/a"},
            "data": {"train": f"{home}/d.jsonl", "eval": f"{home}/e.jsonl", "cache": f"{home}/c"},
            "loss": "dpo",
            "training": {"output_dir": f"{runs}/a"},
            "resume": f"{runs}/a/checkpoints/step-5",
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        done = fastpref("train", f"{home}/c.yaml", "--dry-run")
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = resolved(str(tmp_path), str(tmp_path / "runs"))
    assert f"path: {tmp_path}/m" in whole and f"output_dir: {tmp_path}/runs/a" in whole
    assert resolved("~", "$RUNS") == resolved("$HOME", "${RUNS}") == whole


def test_paths_of_commands_are_expanded(
    fastpref: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "run", full(steps=3))
    done = fastpref("report", "~/run", "-o", "$HOME/page")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page" / "report.html").exists()
    assert not Path("~").exists() and not Path("$HOME").exists()
    monkeypatch.delenv("NAME", raising=False)
    done = fastpref("report", "~/run", "--out", "$NAME/page")
    assert done.stderr == (
        "error: --out: $NAME is not set, got '$NAME/page'; export it, or write the path out\n"
    )
    done = fastpref("eval", "~/run", "--data", "x.jsonl")
    assert done.stderr.startswith(f"error: MODEL: the run {tmp_path}/run has no model/ yet; write")
