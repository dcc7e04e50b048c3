"""The commands of `fastpref data` that build preference data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastpref.utils.errors import UserError

if TYPE_CHECKING:
    from fastpref.data.pair_files import Job
    from fastpref.data.pairs import Build, Form


def pairs(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Scored completions: a file or a Hub name.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl|FILE.parquet", help="File to write.")],
    build: Annotated[
        str,
        typer.Option(
            metavar="best-random|best-worst|all-pairs|k-responses|binary",
            help="best-random: the best completion against a random worse one.",
        ),
    ] = "best-random",
    score: Annotated[
        str | None,
        typer.Option(
            metavar="overall|mean|COLUMN",
            help="UltraFeedback: overall_score (default) or the mean of the four ratings. Single "
            "completions: the column of their score.",
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Completions of each row of k-responses.")] = 4,
    min_gap: Annotated[float, typer.Option(help="Smallest difference of the scores.")] = 0.0,
    score_range: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Scores that become 0 and 1, such as 1,10."),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--eval", min=0, help="Rows to hold out at least, whole prompts.")
    ] = 0,
    keep_desired: Annotated[
        float, typer.Option(help="Share of the desired responses of binary to train on.")
    ] = 1.0,
    keep_undesired: Annotated[
        float, typer.Option(help="Share of the undesired responses of binary to train on.")
    ] = 1.0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=TEXT", help="Leave these rows out; may be repeated."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="text|messages", help="Default: messages for UltraFeedback, else as they are."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all draws.")] = 0,
) -> None:
    """Build pairs, labeled responses or groups of k from completions with scores."""
    from fastpref.data.pair_files import Job, write_pairs
    from fastpref.data.pairs import Recipe

    recipe = Recipe(
        cast("Build", build),
        k,
        min_gap,
        seed,
        cast("Form | None", form),
        None if score_range is None else _range(score_range),
    )
    conditions = tuple(_condition(text) for text in exclude or ())
    job = Job(source, out, recipe, score, conditions, held_out, keep_desired, keep_undesired)
    summary = write_pairs(job)
    for line in _lines(summary, job):
        print(line)


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not column or not equals:
        raise UserError(f"--exclude: expected COLUMN=TEXT, got {text}")
    return column, value


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--score-range: expected LOW,HIGH such as 1,10, got {text}")
    return low, high


def _lines(summary: dict[str, Any], job: Job) -> list[str]:
    """Lines that tell a person what was read, left out and written."""
    groups, prompts, rows = summary["groups"], summary["prompts"], summary["rows"]
    reasons = "; ".join(f"{name}: {count:,}" for name, count in groups["left_out"].items())
    left_out = sum(groups["left_out"].values())
    lines = [
        f"{groups['used']:,} of {groups['read']:,} groups of completions from {summary['source']}; "
        f"left out {left_out:,}" + (f" ({reasons})" if reasons else ""),
        f"{prompts['distinct']:,} prompts; {prompts['repeated']:,} groups repeat an earlier prompt",
        f"{rows['train']:,} {rows['unit']}s to train on: {job.out}",
    ]
    if rows["eval"]:
        lines.append(f"{rows['eval']:,} {rows['unit']}s held out: {job.held_out_path}")
    if "labels" in summary:
        labels = summary["labels"]
        lines[2] += f" ({labels['desired']:,} desired, {labels['undesired']:,} undesired)"
    if rows["discarded"]:
        lines.append(f"{rows['discarded']:,} {rows['unit']}s discarded to keep these shares")
    lengths = summary["characters"]
    text = f"characters: chosen {lengths['chosen']:,.0f}, rejected {lengths['rejected']:,.0f}"
    if "score_gap" in summary:
        gap = summary["score_gap"]
        lines.append(
            f"score gap: mean {gap['mean']:.3g}, median {gap['median']:.3g}, "
            f"from {gap['smallest']:.3g} to {gap['largest']:.3g}"
        )
        text += f"; chosen is longer in {lengths['chosen_longer']:.0%}"
    return [*lines, text, f"summary: {job.summary_path}"]
