"""`fastpref reproduce`: the findings of five papers, at a size for minutes on two cores.

Each module in `papers` has a `STUDY`: jobs, a table, a picture, and claims with bounds. `claims`
has the rule by which a claim holds, does not hold, or is not tested.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpref.model.generate import require
from fastpref.reproduce import results, runner
from fastpref.reproduce.sizes import SIZES, Size
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
    model: Path | None = None,
    seeds: int | None = None,
) -> list[dict[str, Any]]:
    """Run one study, or `all`, and return the contents of the result files.

    data: groups to use instead of generated advice. keep_runs: folder for the run directories,
    which are deleted by default; a second call with it continues a study. model: folder of a
    pretrained model to start from, instead of a small one. seeds: number of seeds.

    Raises UserError for an invalid name, size or file.
    """
    if name != "all" and name not in NAMES:
        raise UserError(f"NAME: expected all or one of {', '.join(NAMES)}, got {name!r}")
    if size not in SIZES:
        raise UserError(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    if data is not None and (name == "all" or not load(name).takes_groups):
        takers = ", ".join(study for study in NAMES if load(study).takes_groups)
        raise UserError(
            f"--data: {name} is measured on data of its own; leave it out, or run {takers}"
        )
    if model is not None and not (model / "config.json").is_file():
        raise UserError(
            f"--model: {model} is no Hugging Face model: it has no config.json; name a folder that "
            "`save_pretrained` wrote"
        )
    require("seeds", seeds, seeds is None or seeds >= 1, "a number >= 1")
    chosen = SIZES[size] if model is None else SIZES[size].starting_from(model.resolve())
    if seeds is not None:
        chosen = replace(chosen, seeds=seeds)
    names: Sequence[str] = NAMES if name == "all" else (name,)
    return [_run(load(study), chosen, display, out, data, keep_runs) for study in names]


def _run(
    study: Study,
    size: Size,
    display: Display,
    out: Path,
    data: Path | None,
    keep_runs: Path | None,
) -> dict[str, Any]:
    started = time.monotonic()
    kind = size.name if size.model is None else f"{size.name}, pretrained"
    size = replace(size, **study.sizes.get(kind, {}))
    context: Any = tempfile.TemporaryDirectory(prefix="reproduce-")
    with context if keep_runs is None else nullcontext(keep_runs / study.name) as folder:
        outcomes = runner.run(study, size, Path(folder), data, display)
    provenance = {
        "command": _command(study, size, data),
        "seconds": round(time.monotonic() - started),
    }
    result = results.write(study, size, outcomes, out, provenance)
    display.note(f"\n{study.title}: {out / study.name}.json, .md, .png; {provenance['seconds']} s")
    for claim in result["claims"]:
        display.note(f"  {claim['verdict']}: {claim['statement']}")
    return result


def _command(study: Study, size: Size, data: Path | None) -> str:
    """The command of a result, with file names in place of paths."""
    options = {"--size": size.name}
    if size.seeds != SIZES[size.name].seeds:
        options["--seeds"] = str(size.seeds)
    options |= {"--data": data.name} if data is not None else {}
    options |= {"--model": size.model.name} if size.model is not None else {}
    return " ".join(["fastpref reproduce", study.name, *(f"{k} {v}" for k, v in options.items())])
