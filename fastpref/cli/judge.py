"""The command that compares the answers of two models: judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastpref.utils.errors import UserError

_ANSWERS = "as `fastpref sample` writes them, or AlpacaEval outputs."


def judge(
    a: Annotated[
        str, typer.Argument(metavar="A", help=f"File with answers of the model, {_ANSWERS}")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="File with answers of the baseline.")],
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Chat API, such as http://localhost:8000/v1."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model of the endpoint.")
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Judge by a reward model: folder or Hub name."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to compare, in order; default: all."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results.")] = Path(
        "runs/judge"
    ),
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="The judge's answers; default: DIR/answers.jsonl."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Names of the models; default: generator, or file name."),
    ] = None,
    match: Annotated[
        str, typer.Option(metavar="prompt|id", help="Field that pairs the answers.")
    ] = "prompt",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out prompts without both answers.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Environment variable with the key; default: none."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Question with {prompt}, {answer_a} and {answer_b}."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the judge; default: 0.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer of the judge; default: 1024.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the judge; default: 0.")] = None,
    body: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Field of the request; null removes it."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Questions at a time; default: 8.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for an answer; default: 120.")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Further tries after a failure; default: 6.")
    ] = None,
    bradley_terry: Annotated[
        bool | None,
        typer.Option("--bradley-terry", help="Preference σ(reward difference), not 1, ½ or 0."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Answers at a time of the reward model; default: 8.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="Of the reward model.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bfloat16|float32|float64", help="Of the reward model."),
    ] = None,
) -> None:
    """Compare answers of two models pair by pair, judged by a chat model or a reward model."""
    from fastpref.evaluation.judge.command import Selection, run
    from fastpref.evaluation.judge.options import ChatOptions, RewardOptions
    from fastpref.utils.progress import Display, quiet_libraries

    of_endpoint = {
        "model": model,
        "api_key_env": api_key_env,
        "template": template,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
        "body": tuple(body) if body else None,
        "workers": workers,
        "timeout": timeout,
        "retries": retries,
    }
    of_reward_model = {
        "bradley_terry": bradley_terry,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
    }
    if (endpoint is None) == (reward_model is None):
        raise UserError("judge: needs --endpoint or --reward-model; give one of them")
    options: ChatOptions | RewardOptions
    if endpoint is not None:
        _refuse(of_reward_model, "--reward-model")
        if model is None:
            raise UserError("--model: is needed with --endpoint; name the model that judges")
        options = ChatOptions(endpoint=endpoint, **_set(of_endpoint))
    else:
        _refuse(of_endpoint, "--endpoint")
        options = RewardOptions(reward_model=str(reward_model), **_set(of_reward_model))
    selection = Selection(a, b, prompts, names, match, skip_missing, limit)
    quiet_libraries()
    with Display(Console()) as display:
        run(selection, options, out, cache, display)


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], owner: str) -> None:
    """Raise UserError if an option of the other judge is set."""
    for name in _set(options):
        raise UserError(f"--{name.replace('_', '-')}: is an option of {owner}; leave it out")
