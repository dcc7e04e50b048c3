"""The command that exports a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `fastpref train`.")],
    step: Annotated[int, typer.Option(metavar="N", help="Step of the checkpoint.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: RUN/exports/step-N.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where an adapter is merged.")
    ] = "cpu",
) -> None:
    """Write a checkpoint of a run as a Hugging Face model; the run may still be going on."""
    from fastpref.model.generate import require
    from fastpref.training.exports import export_step
    from fastpref.training.setup import device_of
    from fastpref.utils.progress import Display, quiet_libraries

    require("device", device, device in ("auto", "cpu", "cuda"), "auto or cpu or cuda")
    quiet_libraries()
    target = output or run / "exports" / f"step-{step}"
    with Display(Console()) as display:
        export_step(run, step, target, device_of(device), display)
