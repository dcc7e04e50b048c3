"""`fastpref plan`: the prediction for a config, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastpref.config import Config, Data, Model
from fastpref.data.sft import group_kind, row_kind
from fastpref.data.sources import load_data, missing_files
from fastpref.data.tokenizers import tokenizer_of
from fastpref.losses import Kind, Objective
from fastpref.losses.normalized import SFT
from fastpref.model.load import announce_code
from fastpref.plan.devices import find_device
from fastpref.plan.predict import Prediction, Predictor, Setup
from fastpref.plan.suggestions import fitting_changes
from fastpref.plan.workload import GroupLengths
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.progress import format_duration

GIB = 2**30
# Responses of a group if `--lengths` names one.
RESPONSES: dict[Kind, int] = {"pairwise": 2, "pointwise": 1, "groupwise": 4}


def run(
    config: Config,
    console: Console,
    device: str,
    ranks: int,
    lengths: str | None,
    out: Path | None,
) -> bool:
    """Predict a run, print the prediction, write it to `out`, and return whether it fits.

    lengths: the option `--lengths`, used instead of the data. Raises UserError in one line.
    """
    announce_code(config.model, partial(_print, console))
    loss = config.build_loss()
    vocabulary = None
    if lengths is None:
        groups, vocabulary = _read_lengths(config.model, config.data, loss)
    else:
        groups = _uniform_lengths(lengths, loss, config)
    predict = Predictor(find_device(device, getattr(torch, config.model.dtype)), vocabulary)
    setup = Setup(config, groups, ranks)
    predicted = predict(setup)
    console.print(_table(predicted, whole_epoch=lengths is None), highlight=False)
    _print(console, verdict(predicted))
    solutions = [] if predicted.fits else fitting_changes(predict, setup)
    for changed, p in solutions:
        changes = " ".join(changed.changes)
        _print(console, f"  {changes}: {_memory(p)}, {format_duration(p.seconds)} a step")
    if not predicted.fits and not solutions:
        _print(
            console,
            "  no single change or pair of changes known to the planner makes it fit",
        )
    if out is not None:
        records = [{"changes": s.changes, **p.record()} for s, p in solutions]
        with replacing(out) as temporary:
            temporary.write_text(json.dumps({**predicted.record(), "changes": records}, indent=1))
    return predicted.fits


def verdict(p: Prediction) -> str:
    """One line: whether the run fits, and how much memory it takes or lacks."""
    usable = p.device.usable / GIB
    where = f"{usable:.1f} GiB of {p.device.name} that a run can use"
    if p.fits:
        return f"fits: {_memory(p)} of the {where}"
    missing = p.parts.total / GIB - usable
    return f"does not fit: {_memory(p)}, {missing:.1f} GiB more than the {where}"


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _read_lengths(model: Model, data: Data, loss: Objective) -> tuple[GroupLengths, int]:
    """Lengths of the groups in the data, and the number of tokens of the tokenizer."""
    if data.streaming:
        raise UserError(
            "data.streaming: lengths are not known before; give --lengths PROMPT,RESPONSE, mean "
            "tokens"
        )
    if missing := missing_files(data):
        raise UserError(
            f"data.train: {missing[0]} is not a file here; give --lengths PROMPT,RESPONSE, "
            "mean tokens"
        )
    rows = row_kind(loss, data)
    try:
        tokenizer = tokenizer_of(model, data, rows)
    except ModelError as error:
        raise UserError(f"{error}; or give --lengths PROMPT,RESPONSE, mean tokens") from None
    groups = load_data(data, "train", tokenizer, rows)
    return GroupLengths.of(groups), len(tokenizer)


def _uniform_lengths(lengths: str, loss: Objective, config: Config) -> GroupLengths:
    """Groups with the lengths of the option, as many as a step has.

    The responses of SFT are single ones, unless the data is a file here with pairs.
    """
    kind = loss.kind
    if isinstance(loss, SFT):
        is_here = not missing_files(config.data)
        kind = group_kind(row_kind(loss, config.data) if is_here else "sft")
    try:
        prompt, *responses = [int(part) for part in lengths.split(",")]
    except ValueError:
        prompt, responses = 0, []
    if not responses or min(prompt, *responses) < 1:
        raise UserError(
            "--lengths: must be tokens of the prompt and of each response, such as 200,300, got "
            f"{lengths}"
        )
    if len(responses) == 1:
        responses *= RESPONSES[kind]
    return GroupLengths.uniform(kind, config.training.batch_size, prompt, responses)


def _table(p: Prediction, whole_epoch: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    total = p.parts.total
    for field in fields(p.parts):
        if size := getattr(p.parts, field.name):
            table.add_row(field.name, f"{size / GIB:8.2f} GiB {size / total:4.0%}")
    table.add_row("peak", f"{total / GIB:8.2f} GiB, at: {p.moment}")
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
        ("time a step", f"{format_duration(p.seconds)} on {p.ranks} × {p.device.name}"),
    ]
    budget = p.budget
    blocks = f"{budget.recomputed_blocks} blocks recomputed"
    rows.insert(0, ("settings", f"{budget.micro_batch_tokens:,} tokens a micro-batch, {blocks}"))
    if whole_epoch:
        rows.append(("an epoch", f"{p.steps:,} steps, {format_duration(p.steps * p.seconds)}"))
        if p.reference_seconds:
            rows.append(("reference, once", format_duration(p.reference_seconds)))
    return rows


def _memory(p: Prediction) -> str:
    return f"{p.parts.total / GIB:.1f} GiB"
