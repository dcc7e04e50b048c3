"""`fastpref plan`: lengths in, a prediction out, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastpref.config import Config
from fastpref.data.dataset import load_groups
from fastpref.data.tokenizers import tokenizer_of
from fastpref.losses import Kind
from fastpref.model.load import announce_code
from fastpref.plan.devices import named
from fastpref.plan.predict import Prediction, Predictor
from fastpref.plan.suggestions import Setup, fitting
from fastpref.plan.workload import Sizes
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import ModelError, UserError

GIB = 2**30
RESPONSES: dict[Kind, int] = {"pairwise": 2, "pointwise": 1, "groupwise": 4}


def run(
    config: Config,
    console: Console,
    device: str,
    ranks: int,
    lengths: str | None,
    out: Path | None,
) -> bool:
    """Predict a run, print it, write it to `out`, and say whether it fits.

    Raises UserError in one line.
    """
    dtype = getattr(torch, config.model.dtype)
    announce_code(config.model, partial(_say, console))
    sizes, vocabulary = _sizes(config, lengths)
    predict = Predictor(named(device, dtype), vocabulary)
    setup = Setup(config, sizes, ranks)
    predicted = predict(config, sizes, ranks)
    console.print(_table(predicted, whole_epoch=lengths is None), highlight=False)
    _say(console, verdict(predicted))
    found = [] if predicted.fits else fitting(predict, setup)
    for changed, then in found:
        _say(
            console,
            f"  {' '.join(changed.changes)}: {_memory(then)}, {_duration(then.seconds)} a step",
        )
    if not predicted.fits and not found:
        _say(console, "  no one or two changes that are known here make it fit")
    if out is not None:
        changes = [{"changes": s.changes, **p.record()} for s, p in found]
        with replacing(out) as temporary:
            temporary.write_text(json.dumps({**predicted.record(), "changes": changes}, indent=1))
    return predicted.fits


def verdict(p: Prediction) -> str:
    """One line: whether it fits, how tightly, or what is missing."""
    usable = p.device.usable / GIB
    where = f"{usable:.1f} GiB of {p.device.name} that a run can use"
    if p.fits:
        return f"fits: {_memory(p)} of the {where}"
    missing = p.parts.total / GIB - usable
    return f"does not fit: {_memory(p)}, {missing:.1f} GiB more than the {where}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _sizes(config: Config, lengths: str | None) -> tuple[Sizes, int | None]:
    """Lengths of the groups, and the tokenizer's number of tokens if there was need of one."""
    kind: Kind = config.build_loss().kind
    if lengths is not None:
        prompt, *responses = _numbers(lengths)
        if len(responses) == 1:
            responses *= RESPONSES[kind]
        return Sizes.alike(kind, config.training.batch_size, prompt, responses), None
    if not Path(config.data.train).expanduser().is_file():
        raise UserError(
            f"data.train: {config.data.train} is not a file here; give --lengths PROMPT,RESPONSE, "
            "mean tokens"
        )
    try:
        tokenizer = tokenizer_of(config)
    except ModelError as error:
        raise UserError(f"{error}; or give --lengths PROMPT,RESPONSE, mean tokens") from None
    groups = load_groups(config.data.train, tokenizer, config.data, kind)
    return Sizes.of(groups), len(tokenizer)


def _numbers(lengths: str) -> list[int]:
    try:
        found = [int(part) for part in lengths.split(",")]
    except ValueError:
        found = []
    if len(found) < 2 or min(found) < 1:
        raise UserError(
            "--lengths: must be tokens of the prompt and of each response, such as 200,300, got "
            f"{lengths}"
        )
    return found


def _table(p: Prediction, whole_epoch: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    of = p.parts.total
    for field in fields(p.parts):
        if size := getattr(p.parts, field.name):
            table.add_row(field.name, f"{size / GIB:8.2f} GiB {size / of:4.0%}")
    table.add_row("peak", f"{of / GIB:8.2f} GiB, at: {p.moment}")
    if p.host_bytes:
        table.add_row("in host memory", f"{p.host_bytes / GIB:8.2f} GiB")
    for name, text in _figures(p, whole_epoch):
        table.add_row(name, text)
    return table


def _figures(p: Prediction, whole_epoch: bool) -> list[tuple[str, str]]:
    f = p.flops
    shares = ", ".join(
        f"{name} {getattr(f, name) / f.total:.0%}" for name in ("trunk", "attention", "head")
    )
    rows = [
        ("tokens a step", f"{p.tokens:,.0f} in {p.micro_batches:.1f} micro-batches a rank"),
        ("FLOPs a step", f"{f.total:.3g} a rank ({shares})"),
        ("time a step", f"{_duration(p.seconds)} on {p.ranks} × {p.device.name}"),
    ]
    if whole_epoch:
        rows.append(("an epoch", f"{p.steps:,} steps, {_duration(p.steps * p.seconds)}"))
        if p.reference_seconds:
            rows.append(("reference, once", _duration(p.reference_seconds)))
    return rows


def _memory(p: Prediction) -> str:
    return f"{p.parts.total / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"
