"""The command line. What a user can cause is one line and exit code 2; a traceback is a bug."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastpref.errors import UserError
from fastpref.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Preference training of language models, fast and in little memory.",
)
data_app = typer.Typer(no_args_is_help=True, help="Generate data sets.")
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of `fastpref` and of `python -m fastpref`."""
    from fastpref.interrupts import Interrupted

    try:
        app()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except OSError as error:  # files that cannot be read or written, a full disk
        _exit(f"error: {error.filename or 'file'}: {error.strerror or error}", 2)
    except Interrupted as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"fastpref {__version__}")
        raise typer.Exit


class _TrainHelp(typer.core.TyperCommand):
    """`--help` with every field of the config below the usual text."""

    def format_epilog(self, ctx: object, formatter: object) -> None:
        from fastpref.config_reference import plain

        formatter.write("\nConfig fields (type; default):\n\n" + plain())  # type: ignore[attr-defined]


@app.command(cls=_TrainHelp)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. optim.lr=5e-7 loss.beta=0.05"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config, print it in full, and stop.")
    ] = False,
) -> None:
    """Train a model on preference data."""
    from fastpref.config import load

    loaded = load(config, overrides)
    if dry_run:
        print(loaded.to_yaml(), end="")
        return

    from fastpref.progress import Display
    from fastpref.train import train as run

    quiet_transformers()
    with Display(Console()) as display:
        run(loaded, display)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs, table and picture.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and weights.")] = 0,
) -> None:
    """Train a small model with SFT, DPO and PMO on two cores and compare them."""
    from fastpref.demo import run
    from fastpref.progress import Display

    quiet_transformers()
    with Display(Console()) as display:
        run(out, seed, display)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes: a minute instead of an hour.")
    ] = False,
    against: Annotated[
        str, typer.Option(metavar="NAME,…", help="Peers to measure beside fastpref; '' for none.")
    ] = "torch,liger,cce,trl",
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path(
        "bench"
    ),
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is one.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="T,D,V", help="Tokens, hidden size, vocabulary; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="OP", help="One op; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each, at least 5.")] = 5,
) -> None:
    """Measure the ops beside plain matrix products and other libraries."""
    from fastpref.bench.peers import check_families
    from fastpref.bench.run import run
    from fastpref.progress import Display

    families = check_families(against)
    with Display(Console()) as display:
        run(
            out,
            display,
            device=device,
            quick=quick,
            families=families,
            shapes=shape or (),
            ops=only or (),
            rounds=rounds,
        )


@app.command()
def losses(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One objective, in full.")
    ] = None,
) -> None:
    """List the objectives, or explain one: formula, incentives, defaults, source."""
    from rich.table import Table

    from fastpref import losses as family
    from fastpref.objectives_reference import plain

    if name is not None:
        try:
            print(plain(name))
        except ValueError as error:
            raise UserError(str(error)) from None
        return
    table = Table("name", "kind", "loss", "defaults", "reference", show_lines=True)
    table.caption = family.NOTATION
    for known in family.names():
        about = family.describe(known)
        defaults = "\n".join(f"{key} {value}" for key, value in about.defaults.items())
        needs = "yes" if about.needs_reference else "no"
        table.add_row(known, about.kind, about.formula, defaults, needs)
    Console().print(table, markup=False)


@data_app.command("pure-semantic")
def pure_semantic(
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and test.jsonl.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probabilities and split.")] = 0,
    independent: Annotated[
        bool, typer.Option(help="Draw p for each pair alone, as in the PMO paper.")
    ] = False,
) -> None:
    """Pairs that differ in one content word, with a target preference probability p."""
    from fastpref.data import pure_semantic as generator

    try:
        paths = generator.write(out, seed, independent=independent)
    except OSError as error:
        raise UserError(f"--out: {error.filename}: {error.strerror}") from None
    for path in paths:
        print(path)


def quiet_transformers() -> None:
    """Progress bars of weight loading and such would break the run's own."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
