"""The command that exports a checkpoint of a run, and uploads exports to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastpref.utils.errors import UserError

if TYPE_CHECKING:
    from fastpref.utils.progress import Display


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `fastpref train`.")],
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Step of the checkpoint; may be left out to upload the final model."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: RUN/exports/step-N.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where an adapter is merged.")
    ] = "cpu",
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload the export to this repository of the Hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.")
    ] = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face model; the run may still be going on."""
    from fastpref.utils import hub
    from fastpref.utils.progress import Display

    if step is None and (output is not None or push_to_hub is None):
        raise UserError(
            "--step: is missing; name the step of a checkpoint, or upload the final model by "
            "--push-to-hub ORG/NAME"
        )
    if private and push_to_hub is None:
        raise UserError("--private: is for --push-to-hub, which is missing; add it")
    if push_to_hub is not None:
        hub.check("--push-to-hub", push_to_hub)
    with Display(Console()) as display:
        folder = output or run / "exports" / f"step-{step}"
        if step is None:
            folder = _final_model(run)
        elif push_to_hub is None or not folder.exists():
            _write(run, step, folder, device, display)
        if push_to_hub is not None:
            retry = f"fastpref export {run} --push-to-hub {push_to_hub}"
            if step is not None:
                retry += f" --step {step}"
            address = hub.upload(folder, push_to_hub, private or None, retry)
            display.note(f"uploaded: {address}")


def _write(run: Path, step: int, folder: Path, device: str, display: Display) -> None:
    from fastpref.model.generate import require
    from fastpref.training.exports import export_step
    from fastpref.training.setup import device_of
    from fastpref.utils.progress import quiet_libraries

    require("device", device, device in ("auto", "cpu", "cuda"), "auto or cpu or cuda")
    quiet_libraries()
    export_step(run, step, folder, device_of(device), display)


def _final_model(run: Path) -> Path:
    """Model of a run that has ended, or the folder of a model itself."""
    for folder in (run, run / "model"):
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder
    raise UserError(
        f"{run}: has no final model to upload; wait for the end of the run, or name a checkpoint "
        "by --step N"
    )
