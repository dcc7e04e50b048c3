"""Ranks that torchrun's agent starts again after a kill, one time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_and_restarted_by_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults.restarts", "--kills", "2"]
    command += ["--folder", str(tmp_path / "runs"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())["torchrun, static"]
    assert (result["kills"], result["restarts"], result["failures"]) == (2, 2, [])
