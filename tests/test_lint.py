"""Lint does not depend on what else lies in the folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folders_that_runs_leave_behind_do_not_change_the_order_of_imports(tmp_path: Path) -> None:
    """`make demo` leaves `runs/` in the root, and a person leaves anything else there."""
    for name in ("fastpref", "kernels", "tests", "benchmarks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__*__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    modules = {path.stem for path in (tmp_path / "tests").rglob("*.py")}
    for name in {*modules, "runs", "yaml", "torch"}:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    command = [sys.executable, "-m", "ruff", "check", "--select", "I", "--no-cache", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
