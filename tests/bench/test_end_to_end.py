"""The comparison of whole trainers: its path in miniature, and its summary of times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.end_to_end import report
from benchmarks.end_to_end.presets import PRESETS

ROOT = Path(__file__).parents[2]


def test_the_path_of_the_cpu_preset(tmp_path: Path) -> None:
    """fastpref against itself; the token ids of every step are compared on the way."""
    out = tmp_path / "result.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.end_to_end.compare"]
    command += ["--dry-run", "--preset", "cpu"]
    done = subprocess.run(
        [*command, "--only", "fastpref", "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    ours = report["contestants"]["fastpref"]
    assert len(ours["seconds"]) == len(ours["loss"]) == 3
    assert ours["rewards/chosen"][0] == 0.0
    assert report["summary"]["fastpref"]["pairs_per_second"] > 0
    assert "fastpref, defaults" in done.stdout


def row(seconds: list[float], losses: list[float], mib: int) -> dict[str, Any]:
    rewards = {"rewards/chosen": [0.0], "rewards/rejected": [0.0]}
    memory = {"peak_bytes": mib * 2**20, "net_bytes": mib * 2**19}
    return {"seconds": seconds, "loss": losses, "setup_seconds": 1.0, **rewards, **memory}


def test_speeds_are_of_the_steps_that_all_took() -> None:
    rows = {
        "fastpref": row([9.0, 1.0, 2.0, 4.0, 100.0], [0.7, 0.6, 0.5], 100),
        "TRL": row([9.0, 5.0, 8.0, 20.0], [0.7, 0.6005, 0.5], 400),
        "TRL, late": {"seconds": [1.0], "failed": "out of time"},
    }
    summary = report.summary(PRESETS["cpu"], rows, [0, 30, 60, 90, 1000])
    assert summary["timed_steps"] == [1, 4]
    ours = summary["summary"]["fastpref"]
    assert ours["seconds"] == [2.0, 1.0, 4.0]
    assert (ours["pairs_per_second"], ours["response_tokens_per_second"]) == (2.0, 30.0)
    assert ours["times"] == 5.0  # of 5, 4 and 5
    against = summary["against_trl"]
    assert against["share_of_its_peak"] == 0.25
    assert against["largest_difference_of_losses"] == pytest.approx(5e-4)
    assert list(against["targets"].values()) == [True, True, True]
    lines = report.table({"contestants": rows, **summary})
    assert any("out of time" in line for line in lines)
