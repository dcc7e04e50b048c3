"""The command line. An error of the user is one line and exit code 2; a traceback is a bug."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastpref.cli import data, evaluate, export, judge, reward, rounds, show, tools, train
from fastpref.cli.arguments import Command, ConfigCommand, with_paths
from fastpref.utils.errors import UserError, first_line, is_out_of_memory, of_file
from fastpref.utils.version import __version__

# The base class of all errors in arguments is in click or, since typer 0.26, in a private copy of
# it; typer exports only its subclass BadParameter.
_UsageError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError"
)


_INTERRUPTED = 128 + 2  # exit code after SIGINT

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Preference training of language models, fast and in little memory.",
)


def _add(
    to: typer.Typer,
    command: Callable[..., Any],
    name: str | None = None,
    kind: type[typer.core.TyperCommand] = Command,
) -> None:
    to.command(name, cls=kind)(with_paths(command))


data_app = typer.Typer(help="Show, build and generate data sets.")
_add(data_app, data.pairs)
_add(data_app, show.show)
_add(data_app, tools.pure_semantic, "pure-semantic")
_add(data_app, evaluate.rejected, "rejected")
_add(app, train.train, kind=train.TrainCommand)
_add(app, train.precompute, kind=ConfigCommand)
_add(app, train.plan, kind=ConfigCommand)
_add(app, rounds.rounds, kind=ConfigCommand)
_add(app, reward.reward, kind=ConfigCommand)
_add(app, tools.demo)
_add(app, tools.bench)
_add(app, tools.reproduce)
_add(app, evaluate.report)
_add(app, export.export)
_add(app, evaluate.sample)
_add(app, evaluate.did_entropy)
_add(app, judge.judge)
_add(app, evaluate.evaluate, "eval")
_add(app, reward.score)
_add(app, tools.losses)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of `fastpref` and of `python -m fastpref`."""
    from fastpref.training.signals import Interrupted

    try:
        code = _run()
        if code == _INTERRUPTED:  # typer's answer to Ctrl-C
            _exit("interrupted", _INTERRUPTED)
        sys.exit(code)
    except UserError as error:
        _exit(f"error: {error}" if error.should_print else "", 2)
    except OSError as error:
        _exit(f"error: {of_file(error)}", 2)
    except Interrupted as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", _INTERRUPTED)


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
