"""`fastpref reproduce`: the findings of five papers, at a size that two cores manage in minutes.

Each module named after a paper has a `STUDY`: jobs, a table, a picture, and claims with bounds.
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
    """Run one study, or `all`, and return what its result files hold.

    data: groups to use instead of generated advice. keep_runs: where run directories stay.
    Raises UserError for a name, a size or a file that is of no use.
    """
    if name != "all" and name not in NAMES:
        raise UserError(f"NAME: expected all or one of {', '.join(NAMES)}, got {name!r}")
    if size not in runner.SIZES:
        raise UserError(f"--size: expected one of {', '.join(runner.SIZES)}, got {size!r}")
    if data is not None and (name == "all" or not load(name).takes_groups):
        takers = ", ".join(each for each in NAMES if load(each).takes_groups)
        raise UserError(
            f"--data: {name} is measured on data of its own; leave it out, or run {takers}"
        )
    names: Sequence[str] = NAMES if name == "all" else (name,)
    return [_one(load(each), runner.SIZES[size], display, out, data, keep_runs) for each in names]


def _one(
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
    about = {
        "command": command if data is None else f"{command} --data {data.name}",
        "seconds": round(time.monotonic() - started),
    }
    found = results.write(study, size, outcomes, out, about)
    display.note(f"\n{study.title}: {out / study.name}.json, .md, .png; {about['seconds']} s")
    for claim in found["claims"]:
        display.note(f"  {claim['verdict']}: {claim['statement']}")
    return found
