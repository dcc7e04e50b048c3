"""The other commands: demo, bench, reproduce, losses, data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastpref.utils.errors import UserError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs, table and picture.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and weights.")] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A Hugging Face model to start from, instead of a small one."
        ),
    ] = None,
) -> None:
    """Train a small model with SFT, DPO and PMO on two cores and compare them."""
    from fastpref.demo import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with Display(Console()) as display:
        run(out, seed, display, model)


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes: a minute instead of an hour.")
    ] = False,
    against: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Peers to measure alongside fastpref; '' for none."),
    ] = "torch,liger,cce,trl",
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path(
        "bench"
    ),
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda if torch finds a GPU.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="T,D,V", help="Tokens, hidden size, vocabulary; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="OP", help="One op; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls per measurement, at least 5.")] = 5,
) -> None:
    """Benchmark the ops against GEMMs and other libraries."""
    from fastpref.bench.contestants import check_families
    from fastpref.bench.runner import run
    from fastpref.utils.progress import Display

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


def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME|all", help="pmo, rc, pro, did, stapo: a paper.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed and short runs: a check, not a verdict.")
    ] = False,
    size: Annotated[
        str, typer.Option(metavar="cores|gpu", help="Three seeds, sized for two cores or a GPU.")
    ] = "cores",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Groups (prompt, completions, scores) instead of generated."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and verdicts.")] = Path(
        "runs/reproduce"
    ),
    runs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the run directories there, and continue with them."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Start from this pretrained model instead of a small one."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds; with fewer than three, no verdict.")
    ] = None,
) -> None:
    """Reproduce the findings of a paper at small scale: a table, a picture and verdicts."""
    from fastpref.reproduce import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    with Display(Console()) as display:
        run(name, display, out, "quick" if quick else size, data, runs, model, seeds)


def losses(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One objective, in full.")
    ] = None,
) -> None:
    """List the objectives, or explain one: formula, incentives, defaults, source, use."""
    from rich.table import Table

    from fastpref import losses as family
    from fastpref.docgen.objectives import plain

    if name is not None:
        try:
            print(plain(name))
        except ValueError as error:
            raise UserError(str(error)) from None
        return
    table = Table("name", "kind", "loss", "defaults", "reference", show_lines=True)
    table.caption = family.NOTATION
    for objective in (*family.names(), *family.reward_names(), *family.rollout_names()):
        about = family.describe(objective)
        defaults = "\n".join(f"{key} {value}" for key, value in about.defaults.items())
        kind = about.kind if about.level == "sequence" else f"{about.kind}, {about.level}"
        if objective in family.reward_names():
            kind = f"{about.kind}, reward model"
        elif objective in family.rollout_names():
            kind = f"{about.kind}, rounds only"
        needs = "yes" if about.needs_reference else "no"
        table.add_row(objective, kind, about.formula, defaults, needs)
    Console().print(table, markup=False)


def pure_semantic(
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and test.jsonl.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probabilities and split.")] = 0,
    independent: Annotated[
        bool, typer.Option(help="Draw p independently for each pair, as in the PMO paper.")
    ] = False,
) -> None:
    """Generate pairs that differ in one content word, with a target preference probability p."""
    from fastpref.data.synthetic import pure_semantic as generator

    try:
        paths = generator.write(out, seed, independent=independent)
    except OSError as error:
        raise UserError(
            f"--out: {error.filename}: {error.strerror}; choose another folder"
        ) from None
    for path in paths:
        print(path)
