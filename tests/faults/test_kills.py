"""Trainings that are killed anywhere, and resumed: the harness, a few dozen times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 4)])
def test_killed_anywhere_and_resumed(tmp_path: Path, ranks: int, kills: int) -> None:
    out = tmp_path / "faults.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.faults.kills",
        "--kills",
        str(kills),
    ]
    command += ["--ranks", str(ranks), "--folder", str(tmp_path / "runs"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())[f"ranks {ranks}"]
    assert found["kills"] == kills and found["failures"] == []
