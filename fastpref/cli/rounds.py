"""`fastpref rounds`: sample, score, pair and train, round after round."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from fastpref.cli.arguments import ConfigFile, DryRun
from fastpref.cli.preflight import check_inputs, check_run
from fastpref.cli.train import note


def rounds(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. rounds.count=5 optim.lr=5e-7"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train on the model's own samples, scored and paired anew in every round."""
    from fastpref.config import load
    from fastpref.rounds.checks import check

    loaded = load(config, overrides, note)
    check(loaded)
    if dry_run:
        print(loaded.to_yaml(), end="")
        return
    check_inputs(loaded)
    check_run(loaded)

    from fastpref.rounds.loop import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with Display(Console()) as display:
        run(loaded, display)
