"""Commands that read a training config: train, precompute, plan."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class TrainHelp(typer.core.TyperCommand):
    """Command whose `--help` lists every field of the config below the usual text."""

    def format_epilog(self, ctx: object, formatter: object) -> None:
        from fastpref.docgen.config import plain

        formatter.write("\nConfig fields (type; default):\n\n" + plain())  # type: ignore[attr-defined]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. optim.lr=5e-7 loss.beta=0.05"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config, print it in full, and stop.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write a trace and a table of steps 4 to 6 to profile/."),
    ] = False,
) -> None:
    """Train a model on preference data. On several GPUs: torchrun … -m fastpref train …"""
    from fastpref.config import load

    loaded = load(config, overrides, _note)
    if dry_run:
        print(loaded.to_yaml(), end="")
        return

    from fastpref import distributed
    from fastpref.training.trainer import train as run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with (
        distributed.process_group(),
        Display(Console(quiet=not distributed.is_main_process())) as display,
    ):
        run(loaded, display, profile)


def precompute(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value …]", help="As for train.")
    ] = None,
) -> None:
    """Compute the reference log-probs of a config, for all runs with its model and data."""
    from fastpref import distributed
    from fastpref.config import load
    from fastpref.training.setup import precompute as run
    from fastpref.utils.progress import Display, quiet_libraries

    loaded = load(config, overrides, _note)
    quiet_libraries()
    with (
        distributed.process_group(),
        Display(Console(quiet=not distributed.is_main_process())) as display,
    ):
        run(loaded, display)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. training.micro_batch_tokens=8192"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="h100, h200, b200, a100-80gb, l40s, 4090, cpu, …")
    ] = "h100",
    ranks: Annotated[int, typer.Option(min=1, help="Devices that train together.")] = 1,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT,RESPONSE", help="Mean numbers of tokens, instead of reading the data."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the prediction to this file.")
    ] = None,
) -> None:
    """Predict memory, time and fit of a run before it starts; exit code 1 if it does not fit."""
    from fastpref.config import load
    from fastpref.plan.command import run
    from fastpref.utils.progress import quiet_libraries

    loaded = load(config, overrides, _note)
    quiet_libraries()
    if not run(loaded, Console(), device, ranks, lengths, json):
        raise typer.Exit(1)


def _note(text: str) -> None:
    # Every rank reads the config before the process group exists; torchrun sets RANK.
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
