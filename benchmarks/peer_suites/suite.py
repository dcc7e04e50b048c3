"""A run of another library's tests in a process of its own, and the table of its result."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpref.docgen import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]


def run(
    folder: Path,
    tests: Sequence[str],
    plugin: str,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Result:
    """Outcomes of the tests, paths relative to `folder`, under a plugin of pytest.

        files     passed, failed and skipped tests of each file
        failed    name and message of each failed test
        skipped   number of tests by reason

    The tests run in `folder`, whose modules come before all others; the package of the plugin is
    found, too. Raises SystemExit for a folder without the tests, and RuntimeError where pytest ends
    before it has run them.
    """
    folder = folder.resolve()
    for test in tests:
        if not (folder / test).exists():
            raise SystemExit(f"FOLDER: expected a checkout with {test}, got {folder}")
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", *tests, "-q", "-p", plugin, "-p", "no:cacheprovider",
            "--junitxml", str(report), "-o", "junit_family=xunit1", *options,
        ]  # fmt: skip
        paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]
        process = subprocess.run(
            command,
            cwd=folder,
            env={
                **os.environ,
                **(environment or {}),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            check=False,
        )
        if process.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"pytest ended with exit code {process.returncode}")
        return _outcomes(ElementTree.parse(report))  # noqa: S314 (written by pytest here)


def _outcomes(report: ElementTree.ElementTree[Any]) -> Result:
    files: dict[str, dict[str, int]] = {}
    failed, skipped = {}, collections.Counter[str]()
    for case in report.iter("testcase"):
        file = str(case.get("file"))
        counts = files.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0})
        failure = case.find("failure")
        failure = case.find("error") if failure is None else failure
        skip = case.find("skipped")
        if skip is not None:
            skipped[str(skip.get("message"))] += 1
        if failure is not None:
            message = str(failure.get("message")).splitlines()[0]
            failed[f"{file}::{case.get('name')}"] = re.sub(r"0x[0-9a-f]+", "0x…", message)
        outcome = "failed" if failure is not None else "passed" if skip is None else "skipped"
        counts[outcome] += 1
    return {"files": files, "failed": failed, "skipped": dict(skipped)}


def write(result: Result, file: Path) -> None:
    """Write the result of one run, and print its table and its failures."""
    print(table(result))
    for name, message in result["failed"].items():
        print(f"failed: {name}: {message}")
    write_report(result, file)


def write_report(report: Result, file: Path) -> None:
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {file}")


def table(result: Result) -> str:
    """Numbers of passed, failed and skipped tests by file, and of all."""
    rows = [
        [f"`{file}`", *(f"{counts[name]:,}" for name in ("passed", "failed", "skipped"))]
        for file, counts in result["files"].items()
    ]
    total = [
        f"{sum(counts[name] for counts in result['files'].values()):,}"
        for name in ("passed", "failed", "skipped")
    ]
    return markdown.table(("tests", "passed", "failed", "skipped"), [*rows, ["all", *total]])
