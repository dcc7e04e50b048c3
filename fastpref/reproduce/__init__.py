"""`fastpref reproduce`: the findings of five papers, at a size for minutes on two cores.

Each module in `papers` has a `STUDY`: jobs, a table, a picture, and claims with bounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastpref.reproduce import results, runner
from fastpref.reproduce.study import Study, load
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

NAMES = ("pmo", "rc", "pro", "did", "stapo")


def run(
    name: str,
    display: Display,
    out: Path,
    size: str = "cores",
    data: Path | None = None,
    keep_runs: Path | None = None,
) -> list[dict[str, Any]]:
    """Run one study, or `all`, and return the contents of the result files.

    data: groups to use instead of generated advice. keep_runs: folder for the run directories,
    which are deleted by default. Raises UserError for an invalid name, size or file.
    """
    if name != "all" and name not in NAMES:
        raise UserError(f"NAME: expected all or one of {', '.join(NAMES)}, got {name!r}")
    if size not in runner.SIZES:
        raise UserError(f"--size: expected one of {', '.join(runner.SIZES)}, got {size!r}")
    if data is not None and (name == "all" or not load(name).takes_groups):
        takers = ", ".join(study for study in NAMES if load(study).takes_groups)
        raise UserError(
            f"--data: {name} is measured on data of its own; leave it out, or run {takers}"
        )
    names: Sequence[str] = NAMES if name == "all" else (name,)
    return [_run(load(study), runner.SIZES[size], display, out, data, keep_runs) for study in names]


def _run(
    study: Study,
    size: runner.Size,
    display: Display,
    out: Path,
    data: Path | None,
    keep_runs: Path | None,
) -> dict[str, Any]:
    started = time.monotonic()
    context: Any = tempfile.TemporaryDirectory(prefix="reproduce-")
    with context if keep_runs is None else nullcontext(keep_runs / study.name) as folder:
        outcomes = runner.run(study, size, Path(folder), data, display)
    command = f"fastpref reproduce {study.name} --size {size.name}"
    provenance = {
        "command": command if data is None else f"{command} --data {data.name}",
        "seconds": round(time.monotonic() - started),
    }
    result = results.write(study, size, outcomes, out, provenance)
    display.note(f"\n{study.title}: {out / study.name}.json, .md, .png; {provenance['seconds']} s")
    for claim in result["claims"]:
        display.note(f"  {claim['verdict']}: {claim['statement']}")
    return result
