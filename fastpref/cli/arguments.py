"""Spellings of arguments that people bring along, and paths with `~` and variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastpref.utils.errors import UserError
from fastpref.utils.model_sources import of_a_run
from fastpref.utils.paths import expand

# Metavars of arguments that are text because a Hub name may stand there.
_MODELS = ("MODEL", "POLICY", "REFERENCE", "TARGET")
_FILES = ("FILE", "DIR", "PATH", "A", "B")
# Options of other trainers, and the keys that they set here.
_KEYS = {
    "-o": "training.output_dir",
    "--out": "training.output_dir",
    "--output": "training.output_dir",
    "--output-dir": "training.output_dir",
    "--output_dir": "training.output_dir",
    "--resume": "resume",
}


# Arguments of the commands that read a config.
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and print the config, and end.")]
Profile = Annotated[
    bool, typer.Option("--profile", help="Write a trace and a table of steps 4 to 6 to profile/.")
]


class Command(typer.core.TyperCommand):
    """Command that takes `-o` for its `--out` or `--output`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out = next((name for name in ("--out", "--output") if name in options_of(self, ctx)), "-o")
        return super().parse_args(ctx, [out if argument == "-o" else argument for argument in args])


class ConfigCommand(typer.core.TyperCommand):
    """Command with a config and overrides, in any of the forms of `as_overrides`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined = repeat_grid(joined_keys(args))
        return super().parse_args(ctx, as_overrides(joined, options_of(self, ctx)))


def options_of(command: typer.core.TyperCommand, ctx: Any) -> dict[str, bool]:
    """Return the names of a command's options, and whether a value follows them."""
    return {
        name: not getattr(parameter, "is_flag", False)
        for parameter in command.get_params(ctx)
        for name in parameter.opts
    }


def repeat_grid(arguments: Sequence[str]) -> list[str]:
    """Write `--grid` before each `key=values` that follows it, up to the next option."""
    repeated: list[str] = []
    is_grid = False
    for argument in arguments:
        if argument.startswith("-"):
            is_grid = argument == "--grid" or argument.startswith("--grid=")
        elif is_grid and "=" in argument and repeated[-1] != "--grid":
            repeated.append("--grid")
        repeated.append(argument)
    return repeated


def joined_keys(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `key = value`, `key= value` and `key =value` as one each."""
    joined: list[str] = []
    for argument in arguments:
        key = re.fullmatch(r"(?:--)?[a-z]\w*(?:\.\w+)*(=?)", joined[-1] if joined else "")
        # Behind `key` a sign has to follow, and behind `key=` no option and no other key.
        is_value = re.match(r"--|[a-z]\w*(\.\w+)*=", argument) is None
        if key and (is_value if key[1] else argument.startswith("=")):
            joined[-1] += argument
        else:
            joined.append(argument)
    return joined


def as_overrides(arguments: Sequence[str], options: dict[str, bool]) -> list[str]:
    """Rewrite arguments as CONFIG.yaml, `key=value` and the options of the command.

    `--key=value` and `--key value` become `key=value`, `--config FILE` becomes FILE, `-o DIR` sets
    training.output_dir, and `--resume`, alone or with a value, sets resume.

    options: of the command, and whether a value follows them.

    Raises UserError for an option of another trainer, and for a key without its section.
    """
    rest = list(arguments)
    named: list[str] = []  # the config
    positional: list[str] = []
    own: list[str] = []
    while rest:
        argument = rest.pop(0)
        name, sign, value = argument.partition("=")
        if name in options or not argument.startswith("-"):
            (own if name in options else positional).append(argument)
            if options.get(name) and not sign and rest:
                own.append(rest.pop(0))
        elif name == "--config" and (sign or rest):
            named.append(value if sign else rest.pop(0))
        elif (key := _key(name)) is None:
            own.append(argument)
        elif sign:
            positional.append(f"{key}={value}")
        elif key == "resume":
            takes = bool(rest) and _is_checkpoint(rest[0])
            positional.append(f"resume={rest.pop(0) if takes else 'auto'}")
        elif not rest or rest[0].startswith("--"):
            raise UserError(f"{name}: has no value; write {key}=VALUE")
        else:
            positional.append(f"{key}={rest.pop(0)}")
    # The config comes first, wherever it stands.
    positional.sort(key=lambda argument: "=" in argument and not os.path.isfile(argument))
    return named + positional + own


def _is_checkpoint(argument: str) -> bool:
    """Whether an argument behind `--resume` is its value, and not the config or another key."""
    is_other = argument.startswith("-") or "=" in argument or argument.endswith((".yaml", ".yml"))
    return not is_other


def _key(option: str) -> str | None:
    """Return the key of the config that an option such as `--optim.lr` sets, None if none does."""
    from fastpref.config import Config, inner_section
    from fastpref.config.foreign import foreign_keys

    if option in _KEYS:
        return _KEYS[option]
    if not option.startswith("--"):
        return None
    key = option.removeprefix("--").replace("-", "_")
    sections = {name: inner_section(field) for name, field in Config.model_fields.items()}
    if key.partition(".")[0] in sections and ("." in key or sections[key] is None):
        return key
    owners = [name for name, inner in sections.items() if inner and key in inner.model_fields]
    if owners:
        names = " or ".join(f"{owner}.{key}=VALUE" for owner in owners)
        raise UserError(f"{option}: is no option; set the key of the config, {names}")
    if foreign := foreign_keys({key: None}):
        ours, advice = foreign[0].counterpart
        if ours:
            raise UserError(f"{option}: is an option of other trainers; write {ours}=VALUE")
        raise UserError(f"{option}: is an option of other trainers; leave it out: {advice}")
    return None


def with_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that `~`, `$NAME` and run directories in its arguments are resolved."""
    hints = get_type_hints(command, include_extras=True)

    @wraps(command)
    def resolved(**arguments: Any) -> Any:
        return command(**{name: _resolved(name, hints[name], v) for name, v in arguments.items()})

    # typer reads the annotations of what it is given.
    resolved.__annotations__ = hints
    resolved.__signature__ = signature(command, eval_str=True)  # type: ignore[attr-defined]
    return resolved


def _resolved(name: str, hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(name, hint, item) for item in value]
    info = next(iter(getattr(hint, "__metadata__", ())), None)
    metavar = str(getattr(info, "metavar", "") or "")
    is_argument = isinstance(info, typer.models.ArgumentInfo)
    label = metavar if is_argument else f"--{name.replace('_', '-')}"
    if not isinstance(value, Path | str):
        return value
    if isinstance(value, str) and metavar in _MODELS:
        return of_a_run(label, value)
    if isinstance(value, Path) or metavar in _FILES:
        try:
            return type(value)(expand(str(value)))
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
    return value
