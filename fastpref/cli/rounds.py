"""`fastpref rounds`: sample, score, pair and train, round after round."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastpref.cli.arguments import ConfigFile, DryRun
from fastpref.cli.preflight import check_inputs, check_run
from fastpref.cli.train import join_ranks, note, refused_once, show_config

if TYPE_CHECKING:
    from fastpref.config import Config


def rounds(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. rounds.count=5 optim.lr=5e-7"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train on the model's own samples, scored and paired anew in every round.

    On several GPUs: torchrun … -m fastpref rounds …
    """
    join_ranks()
    with refused_once():
        loaded = _load(config, overrides)
        if not dry_run:
            check_inputs(loaded)
            check_run(loaded)
    if dry_run:
        show_config(loaded)
        return

    from fastpref import distributed
    from fastpref.rounds.loop import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with (
        distributed.process_group(),
        Display(Console(quiet=not distributed.is_main_process())) as display,
    ):
        run(loaded, display)


def _load(path: Path, overrides: list[str] | None) -> Config:
    from fastpref.config import load
    from fastpref.rounds.checks import check

    loaded = load(path, overrides, note)
    check(loaded)
    return loaded
