"""The command line. What a user can cause is one line and exit code 2; a traceback is a bug."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastpref.errors import UserError, first_line
from fastpref.version import __version__

# What torch and Python say of memory that is not there.
_NO_MEMORY = ("OutOfMemoryError", "MemoryError", "DefaultCPUAllocator")
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # wherever typer keeps it

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Preference training of language models, fast and in little memory.",
)
data_app = typer.Typer(help="Generate data sets.")
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of `fastpref` and of `python -m fastpref`."""
    from fastpref.interrupts import Interrupted

    try:
        sys.exit(_run())
    except UserError as error:
        _exit(f"error: {error}" if error.is_news else "", 2)
    except OSError as error:  # files that cannot be read or written, a full disk
        _exit(
            f"error: {error.filename or 'file'}: {error.strerror or error}; check path and disk", 2
        )
    except Interrupted as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _run() -> int | None:
    """The exit code of the command; what other libraries raise for a user's sake is a UserError."""
    try:
        return app(standalone_mode=False)
    except _UsageError as error:
        used: Any = error
        command = used.ctx.command_path if used.ctx else "fastpref"
        message = used.format_message().rstrip(".")
        raise UserError(f"{message}; see {command} --help") from None
    except (RuntimeError, MemoryError) as error:
        if not any(words in f"{type(error).__name__} {error}" for words in _NO_MEMORY):
            raise
        raise UserError(
            "out of memory; lower training.max_tokens or data.max_length, or train an adapter: "
            f"fastpref plan says what fits ({first_line(error)})"
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
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write a trace and a table of steps 4 to 6 to profile/."),
    ] = False,
) -> None:
    """Train a model on preference data. On several GPUs: torchrun … -m fastpref train …"""
    from fastpref.config import load

    loaded = load(config, overrides)
    if dry_run:
        print(loaded.to_yaml(), end="")
        return

    from fastpref import ranks
    from fastpref.progress import Display
    from fastpref.train import train as run

    quiet_libraries()
    with ranks.joined(), Display(Console(quiet=not ranks.is_first())) as display:
        run(loaded, display, profile)


@app.command()
def precompute(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value …]", help="As for train.")
    ] = None,
) -> None:
    """Compute the reference log-probs of a config, for all runs with its model and data."""
    from fastpref import ranks
    from fastpref.config import load
    from fastpref.prepare import precompute as run
    from fastpref.progress import Display

    loaded = load(config, overrides)
    quiet_libraries()
    with ranks.joined(), Display(Console(quiet=not ranks.is_first())) as display:
        run(loaded, display)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value …]", help="E.g. training.max_tokens=8192"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="h100, h200, b200, a100-80gb, l40s, 4090, cpu, …")
    ] = "h100",
    ranks: Annotated[int, typer.Option(min=1, help="Devices that train together.")] = 1,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="PROMPT,RESPONSE", help="Mean tokens, instead of reading the data."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the prediction there.")
    ] = None,
) -> None:
    """Predict memory, time and fit of a run before it starts; exit code 1 if it does not fit."""
    from fastpref.config import load
    from fastpref.estimate.run import run

    loaded = load(config, overrides)
    quiet_libraries()
    if not run(loaded, Console(), device, ranks, lengths, json):
        raise typer.Exit(1)


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

    quiet_libraries()
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
        Path | None, typer.Option(metavar="DIR", help="Keep the run directories there.")
    ] = None,
) -> None:
    """Re-create the findings of a paper at a small size: a table, a picture and verdicts."""
    from fastpref.progress import Display
    from fastpref.reproduce import run

    quiet_libraries()
    with Display(Console()) as display:
        run(name, display, out, "quick" if quick else size, data, runs)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run directories of `fastpref train`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Default: the run directory; of several runs, report."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again while the runs go on, until Ctrl-C.")
    ] = False,
) -> None:
    """Show runs as one page of pictures and tables: DIR/report.html."""
    from fastpref.progress import Display
    from fastpref.report import report as make

    with Display(Console()) as display:
        make(runs, out, watch, display)


# What the commands that draw from models share.
_PROMPTS = typer.Option(metavar="FILE", help="Data with prompts, in any of the formats.")
_DEVICE = typer.Option(metavar="auto|cpu|cuda", help="auto: cuda if there.")
_DTYPE = typer.Option(
    metavar="bfloat16|float32|float64", help="Default: float32 on CPU, bfloat16 on CUDA."
)


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub name; or an adapter's folder.")
    ],
    prompts: Annotated[str, _PROMPTS],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Default: standard output.")
    ] = None,
    n: Annotated[int, typer.Option(help="Completions of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Completions at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same completions.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Sample a prompt as often as the data has it.")
    ] = False,
    engine: Annotated[
        str, typer.Option(metavar="auto|transformers|vllm", help="auto: vllm if there, on CUDA.")
    ] = "auto",
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Draw completions from a model, with their log-probs under it."""
    from fastpref.generate import Sampling
    from fastpref.progress import Display
    from fastpref.sample import run

    sampling = Sampling(n, temperature, top_p, max_new_tokens, batch_size, seed, engine)
    quiet_libraries()
    with Display(Console(stderr=True)) as display:  # stdout is for the completions
        run(
            model,
            prompts,
            out,
            sampling,
            display,
            limit=limit,
            duplicates=duplicates,
            device=device,
            dtype=dtype,
        )


@app.command()
def did_entropy(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="Folder or Hub name.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="What it began from.")],
    prompts: Annotated[str, _PROMPTS],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for pairs, the trained model and results.")
    ] = Path("runs/did-entropy"),
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts for the entropy; default: those of --prompts."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pairs for each prompt.")] = 1,
    responses: Annotated[
        int, typer.Option(min=2, help="Samples of the trained model for each prompt.")
    ] = 4,
    temperature: Annotated[float, typer.Option(help="Of all samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of samples and training.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="Of the training, e.g. optim.lr=1e-5."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Estimate the entropy of the differential information from a reference to a policy."""
    from fastpref.did_entropy import Estimate, table
    from fastpref.generate import Sampling
    from fastpref.progress import Display

    estimate = Estimate(
        policy,
        reference,
        prompts,
        out,
        # Not vllm: an entropy needs samples of the very distribution that scores them.
        Sampling(responses, temperature, 1.0, max_new_tokens, batch_size, seed, "transformers"),
        pairs=samples,
        held_out=held_out,
        limit=limit,
        overrides=tuple(overrides or ()),
        device=device,
        dtype=dtype,
    )
    quiet_libraries()
    with Display(Console()) as display:
        result = estimate.run(display)
    Console().print(table(result))
    print(out / "did_entropy.json")


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub name; or an adapter's folder.")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="Pairs, in any of the formats.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The reference of changes and log-ratios.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Default: the table alone.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="As data.max_length; default: 2048, or what the model knows."),
    ] = None,
    truncation: Annotated[
        str, typer.Option(metavar="keep_start|keep_end", help="As data.truncation.")
    ] = "keep_start",
    add_eos: Annotated[bool, typer.Option("--eos/--no-eos", help="As data.add_eos.")] = True,
    cache: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for tokenised data; safe to delete.")
    ] = "~/.cache/fastpref",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 16384,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Measure a model on pairs: accuracy, margins, KL, PCI, entropy, lengths, with intervals."""
    from fastpref.evaluate import run
    from fastpref.progress import Display

    quiet_libraries()
    with Display(Console()) as display:
        run(
            model,
            data,
            out,
            display,
            against=against,
            max_length=max_length,
            max_tokens=max_tokens,
            options={"truncation": truncation, "add_eos": add_eos, "cache": cache},
            device=device,
            dtype=dtype,
        )


@app.command()
def losses(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One objective, in full.")
    ] = None,
) -> None:
    """List the objectives, or explain one: formula, incentives, defaults, source, use."""
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
        kind = about.kind if about.level == "sequence" else f"{about.kind}, {about.level}"
        needs = "yes" if about.needs_reference else "no"
        table.add_row(known, kind, about.formula, defaults, needs)
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
        raise UserError(
            f"--out: {error.filename}: {error.strerror}; choose another folder"
        ) from None
    for path in paths:
        print(path)


def quiet_libraries() -> None:
    """Progress bars of weight loading and such would break the run's own."""
    import warnings

    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub

    # That one process saves its checkpoints alone is no news.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", module="peft|transformers")  # of what is refused in our words
    hub.set_verbosity_error()  # of every try to reach the Hub it would tell
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
