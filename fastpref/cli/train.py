"""Commands that read a training config: train, precompute, plan."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastpref.cli.arguments import ConfigCommand, ConfigFile, Profile
from fastpref.cli.preflight import check_inputs, check_output, check_run
from fastpref.utils import slurm
from fastpref.utils.errors import UserError

if TYPE_CHECKING:
    from fastpref.config import Config
    from fastpref.config.grid import Grid


# Until torchrun has ended the other ranks of a node after an error of the first one.
_FIRST_RANK_SECONDS = 3.0


class TrainCommand(ConfigCommand):
    """Command whose `--help` lists the config's fields."""

    def format_epilog(self, ctx: object, formatter: object) -> None:
        from fastpref.docgen.config import plain

        formatter.write("\nConfig fields (type; default):\n\n" + plain())  # type: ignore[attr-defined]


def train(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. optim.lr=5e-7 loss.beta=0.05"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and print the config, or the folders of a grid."),
    ] = False,
    profile: Profile = False,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="key=value,value …",
            help="Train a run for each combination of the values, one after the other.",
        ),
    ] = None,
) -> None:
    """Train a model on preference data. On several GPUs: torchrun … -m fastpref train …"""
    join_ranks()
    if grid:
        _train_grid(config, overrides or [], grid, dry_run, profile)
        return
    run_training(lambda: _load(config, overrides), dry_run, profile)


def run_training(load: Callable[[], Config], dry_run: bool, profile: bool) -> None:
    """Load and check a config, and train on the ranks of this run, or print it in a dry run."""
    with refused_once():
        loaded = load()
        if not dry_run:
            check_inputs(loaded)
            check_run(loaded)
    if dry_run:
        show_config(loaded)
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


def _train_grid(
    path: Path, overrides: list[str], items: list[str], dry_run: bool, profile: bool
) -> None:
    """Train the runs of a grid; then rank 0 prints their table and writes their report."""
    from fastpref.config.grid import load_grid

    with refused_once():
        grid = load_grid(path, overrides, items, note)
        for point in grid.points:
            _of_language_model(point.config)
        for point in () if dry_run else grid.points:
            check_inputs(point.config)
            check_output(point.config)
    if dry_run:
        for point in grid.points:
            print(point.folder)
        return

    from fastpref import distributed
    from fastpref.training.grid import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with distributed.process_group():
        is_main = distributed.is_main_process()
        with Display(Console(quiet=not is_main)) as display:
            outcomes = run(grid, display, profile)
    if not is_main:
        return
    _summarize_grid(grid)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise UserError(
            f"{failed} of {len(outcomes)} runs failed, see {grid.folder / 'grid.json'}; fix the "
            "cause and run the same command"
        )


def _summarize_grid(grid: Grid) -> None:
    from fastpref.report import report
    from fastpref.report.grid_table import grid_table
    from fastpref.report.runs import has_metrics
    from fastpref.utils.progress import Display

    console = Console()
    console.print(grid_table(grid.folder), markup=False)
    with Display(console) as display:
        display.note(f"grid: {grid.folder / 'grid.json'}")
        if any(has_metrics(point.folder) for point in grid.points):
            report([grid.folder], None, False, display)


def precompute(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value …]", help="As for train.")
    ] = None,
) -> None:
    """Compute the reference log-probs of a config, for all runs with its model and data."""
    join_ranks()
    with refused_once():
        loaded = _load(config, overrides)
        check_inputs(loaded)

    from fastpref import distributed
    from fastpref.training.setup import precompute as run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with (
        distributed.process_group(),
        Display(Console(quiet=not distributed.is_main_process())) as display,
    ):
        run(loaded, display)


def plan(
    config: ConfigFile,
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

    loaded = _without_rounds(load(config, overrides, note))

    from fastpref.plan.command import run
    from fastpref.utils.progress import quiet_libraries

    quiet_libraries()
    if not run(loaded, Console(), device, ranks, lengths, json):
        raise typer.Exit(1)


def join_ranks() -> None:
    """Take the rank of a task of srun, before anything is printed; note where srun is missing."""
    slurm.adopt(os.environ)
    advice = slurm.lone_task(os.environ)
    if advice is not None:
        note(advice)


def _load(path: Path, overrides: list[str] | None) -> Config:
    from fastpref.config import load

    return _of_language_model(load(path, overrides, note))


def _of_language_model(config: Config) -> Config:
    """The config itself; raises ConfigError for one of a reward model or of rounds."""
    from fastpref.config import ConfigError

    name = config.build_loss().name
    if config.build_loss().of_rewards:
        raise ConfigError(f"loss: {name} trains a reward model; use fastpref reward, or another")
    return _without_rounds(config)


def _without_rounds(config: Config) -> Config:
    """The config itself; raises ConfigError for one whose data are prompts."""
    from fastpref.config import ConfigError

    if config.rounds is not None:
        raise ConfigError("rounds: is for fastpref rounds, which samples data; use that command")
    return config


@contextmanager
def refused_once() -> Iterator[None]:
    """Context manager in which one rank of each node prints an error, which they all find.

    An error of another rank alone is printed later: torchrun ends that rank before, unless the
    first one has none.
    """
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_FIRST_RANK_SECONDS)
        raise


def show_config(config: Config) -> None:
    """Print the config of a dry run, which all ranks have read, once."""
    if os.environ.get("RANK", "0") == "0":
        print(config.to_yaml(), end="")


def note(text: str) -> None:
    # Every rank reads the config before the process group exists; torchrun sets RANK.
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
