"""Commands about reward models: reward, score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastpref.cli.arguments import ConfigFile, DryRun, Profile
from fastpref.cli.train import join_ranks, note, run_training

if TYPE_CHECKING:
    from fastpref.config import Config


def reward(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. loss.name=plackett_luce optim.lr=1e-5"),
    ] = None,
    dry_run: DryRun = False,
    profile: Profile = False,
) -> None:
    """Train a reward model. On several GPUs: torchrun … -m fastpref reward …"""
    join_ranks()
    run_training(lambda: _load(config, overrides), dry_run, profile)


def _load(path: Path, overrides: list[str] | None) -> Config:
    """Load the config of a reward model; raises ConfigError for one of a language model."""
    from fastpref import losses
    from fastpref.config import ConfigError, load

    config = load(path, overrides, note)
    objective = config.build_loss()
    if not objective.of_rewards:
        raise ConfigError(
            f"loss: {objective.name} trains a language model; use fastpref train, or one of "
            f"{', '.join(losses.reward_names())}"
        )
    return config


def score(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Reward model: folder or Hub name.")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Data in any format of the trainer.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Default: standard output.")
    ] = None,
    function: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Instead of MODEL: Python code that is run here. It takes a list of prompts and "
            "a list of completions and returns a number for each.",
        ),
    ] = None,
    text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="Score text prompts and responses as plain text, as the trainer reads them, not "
            "as a conversation.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="First rows only.")] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto: cuda if torch finds a GPU.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bfloat16|float32|float64", help="Default: float32 on CPU, bfloat16 on CUDA."
        ),
    ] = None,
) -> None:
    """Add the score of every response to preference data, by a reward model or a function."""
    from fastpref.evaluation.score import Source, run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with Display(Console(stderr=True)) as display:  # stdout is for the rows
        source = Source(model, function, batch_size, device, dtype, text)
        run(source, data, out, display, limit)
