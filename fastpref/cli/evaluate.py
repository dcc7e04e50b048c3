"""Commands that read trained models and runs: eval, sample, did-entropy, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastpref.utils.errors import UserError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Run directories, or a folder of such."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Default: the folder RUN, or report for several."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Rewrite the page while the runs continue, until Ctrl-C."),
    ] = False,
) -> None:
    """Write a page of charts and tables about runs: DIR/report.html."""
    from fastpref.report import report as make
    from fastpref.utils.progress import Display

    with Display(Console()) as display:
        make(runs, out, watch, display)


# Options of the commands that sample from models.
_PROMPTS = typer.Option(metavar="FILE", help="Data with prompts, in any format of the trainer.")


_DEVICE = typer.Option(metavar="auto|cpu|cuda", help="auto: cuda if torch finds a GPU.")


_DTYPE = typer.Option(
    metavar="bfloat16|float32|float64", help="Default: float32 on CPU, bfloat16 on CUDA."
)


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
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
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
    """Sample completions from a model, with their log-probs."""
    from fastpref.evaluation.sample import run
    from fastpref.model.generate import Sampling
    from fastpref.utils.progress import Display, quiet_libraries

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


def did_entropy(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="Folder or Hub name.")],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The model before training.")
    ],
    prompts: Annotated[str, _PROMPTS],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for pairs, the trained model and results.")
    ] = Path("runs/did-entropy"),
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts for the entropy; default: --prompts."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pairs for each prompt.")] = 1,
    responses: Annotated[
        int, typer.Option(min=2, help="Samples of the trained model for each prompt.")
    ] = 4,
    temperature: Annotated[float, typer.Option(help="Temperature of all samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of samples and training.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="Override of the training config."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Estimate the entropy of the differential information from a reference to a policy."""
    from fastpref.evaluation.did_entropy import Estimate, table
    from fastpref.model.generate import Sampling
    from fastpref.utils.progress import Display, quiet_libraries

    estimate = Estimate(
        policy,
        reference,
        prompts,
        out,
        # The entropy needs samples from exactly the distribution that scores them, so no vllm.
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


def rejected(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A model that stands for the one you want.")
    ],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The model that will be trained.")
    ],
    prompts: Annotated[str, _PROMPTS],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Pairs to train on.")],
    beta: Annotated[float, typer.Option(help="beta of the DPO run that will use the pairs.")] = 0.1,
    candidates: Annotated[int, typer.Option(help="Rejected responses to choose from.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Pairs for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of all samples.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Draw pairs whose rejected responses let DPO learn a target: the DID paper's ideal ones."""
    from fastpref.evaluation.ideal_rejected import IdealRejected
    from fastpref.utils.progress import Display, quiet_libraries

    task = IdealRejected(
        target,
        reference,
        prompts,
        out,
        beta=beta,
        candidates=candidates,
        pairs=samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        limit=limit,
        device=device,
        dtype=dtype,
    )
    quiet_libraries()
    with Display(Console()) as display:
        task.run(display)
    print(out)


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub name; or an adapter's folder.")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="Pairs, in any format of the trainer.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Reference model of changes and log-ratios.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Default: print the table only.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="As data.max_length; default: 2048, or less if the model is shorter."
        ),
    ] = None,
    truncation: Annotated[
        str, typer.Option(metavar="keep_start|keep_end", help="As data.truncation.")
    ] = "keep_start",
    add_eos: Annotated[bool, typer.Option("--eos/--no-eos", help="As data.add_eos.")] = True,
    cache: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for tokenized data; safe to delete.")
    ] = "~/.cache/fastpref",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 16384,
    text: Annotated[
        bool, typer.Option("--text", help="Of a reward model: as that of fastpref score.")
    ] = False,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Measure a model on pairs: accuracy, margins, KL, PCI, entropy, lengths, with intervals.

    A reward model: its accuracy, of each subset and section of data in the form of RewardBench.
    """
    from fastpref.evaluation import reward_bench
    from fastpref.evaluation.evaluate import run
    from fastpref.utils.progress import Display, quiet_libraries

    quiet_libraries()
    if reward_bench.is_classifier(model):
        if against is not None:
            raise UserError("--against: is for language models; leave it out")
        with Display(Console()) as display:
            reward_bench.run(model, data, out, display, device=device, dtype=dtype, text=text)
        return
    if text:
        raise UserError(f"--text: is for reward models, and {model} is none; leave it out")
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
