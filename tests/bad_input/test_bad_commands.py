"""Command lines; and the same in a process of its own, with nothing of the tests around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import commands, configs, data, models
from tests.bad_input.command import Case, Shell

ROOT = Path(__file__).parents[2]
EVERY = [*commands.CASES, *configs.CASES, *data.CASES, *models.CASES]


@pytest.mark.parametrize("case", commands.CASES, ids=str)
def test_a_command_that_is_refused(shell: Shell, case: Case) -> None:
    shell.meet(case)


def test_there_are_five_hundred_cases() -> None:
    """Written by hand; generated ones come on top."""
    assert len({(case.name, case.says) for case in EVERY}) >= 500


def test_without_a_command_there_is_help(shell: Shell) -> None:
    outcome = shell()
    assert (outcome.code, outcome.err) == (0, "") and "did-entropy" in outcome.out


@pytest.mark.parametrize("line", ["train c.yaml optim.lr=-1", "train", "train c.yaml"])
def test_in_a_process_of_its_own(shell: Shell, line: str) -> None:
    shell.prepare(Case("a process", None, {"model": {"path": "nowhere"}}, models.PAIRS))
    done = subprocess.run(
        [sys.executable, "-m", "fastpref", *line.split()],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
