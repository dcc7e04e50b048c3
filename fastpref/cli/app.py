"""The command line. An error of the user is one line and exit code 2; a traceback is a bug."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fastpref.cli import data, evaluate, export, judge, tools, train
from fastpref.utils.errors import UserError, first_line, is_out_of_memory
from fastpref.utils.version import __version__

# The base class of all errors in arguments is in click or, since typer 0.26, in a private copy of
# it; typer exports only its subclass BadParameter.
_UsageError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError"
)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Preference training of language models, fast and in little memory.",
)


data_app = typer.Typer(help="Build and generate data sets.")
data_app.command()(data.pairs)
data_app.command("pure-semantic")(tools.pure_semantic)
data_app.command("rejected")(evaluate.rejected)
app.command(cls=train.TrainCommand)(train.train)
app.command()(train.precompute)
app.command()(train.plan)
app.command()(tools.demo)
app.command()(tools.bench)
app.command()(tools.reproduce)
app.command()(evaluate.report)
app.command()(export.export)
app.command()(evaluate.sample)
app.command()(evaluate.did_entropy)
app.command()(judge.judge)
app.command("eval")(evaluate.evaluate)
app.command()(tools.losses)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of `fastpref` and of `python -m fastpref`."""
    from fastpref.training.signals import Interrupted

    try:
        sys.exit(_run())
    except UserError as error:
        _exit(f"error: {error}" if error.should_print else "", 2)
    except OSError as error:  # files that cannot be read or written, a full disk
        _exit(
            f"error: {error.filename or 'file'}: {error.strerror or error}; check path and disk", 2
        )
    except Interrupted as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _run() -> int | None:
    """Run the command and return its exit code; errors of the user raise UserError."""
    try:
        return app(standalone_mode=False)
    except _UsageError as error:
        usage: Any = error
        command = usage.ctx.command_path if usage.ctx else "fastpref"
        message = usage.format_message().rstrip(".")
        raise UserError(f"{message}; see {command} --help") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory; lower training.micro_batch_tokens or data.max_length, or train an "
            f"adapter: fastpref plan says what fits ({first_line(error)})"
        ) from None


def _exit(message: str, code: int) -> None:
    if message:
        print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"fastpref {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
