"""Changes of a config that make it fit, the cheapest first.

The cost of a change is seconds of a step times devices. Each change is tried alone, then any two
together if no single one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import yaml

from fastpref import config as configs
from fastpref.data.batch_plan import tokens_of
from fastpref.plan.predict import Prediction, Predictor, Setup
from fastpref.utils.errors import UserError

SHOWN = 3

Change = Callable[[Setup], Iterator[Setup]]  # settings to try in turn, until one fits


def fitting_changes(predict: Predictor, setup: Setup) -> list[tuple[Setup, Prediction]]:
    """The cheapest changes, at most `SHOWN`, after which the run fits."""
    for size in (1, 2):
        solutions = []
        for changes in combinations(CHANGES, size):
            solution = _first_that_fits(predict, setup, changes)
            if solution is not None:
                solutions.append(solution)
        if solutions:
            return sorted(solutions, key=lambda solution: solution[1].cost)[:SHOWN]
    return []


def _first_that_fits(
    predict: Predictor, setup: Setup, changes: tuple[Change, ...]
) -> tuple[Setup, Prediction] | None:
    change, *rest = changes
    for changed in change(setup):
        if rest:
            solution = _first_that_fits(predict, changed, tuple(rest))
            if solution is not None:
                return solution
            continue
        try:
            predicted = predict(changed)
        except UserError:  # the changed config cannot run
            continue
        if predicted.fits:
            return changed, predicted
    return None


def _with(setup: Setup, **values: Any) -> Setup:
    """Set fields `section__key` of the config; raises ConfigError."""
    raw = yaml.safe_load(setup.config.to_yaml())
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            raw[section][key] = value
        else:
            raw[section] = value
    changes = [f"{name.replace('__', '.')}={_typed(value)}" for name, value in values.items()]
    return replace(setup, config=configs.parse(raw), changes=(*setup.changes, *changes))


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if not isinstance(value, dict):
        return str(value)
    return "'" + yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip() + "'"


def _longest_group(setup: Setup) -> int:
    """Tokens of the longest group in the layout of the run."""
    return int(tokens_of(setup.lengths, setup.layout).max())  # type: ignore[arg-type]


def _smaller_batches(setup: Setup) -> Iterator[Setup]:
    """Halve `training.micro_batch_tokens` again and again, down to the longest group."""
    longest = _longest_group(setup)
    tokens = setup.config.training.micro_batch_tokens
    # Automatic ones are already as small as it helps.
    while tokens != "auto" and tokens > longest:
        tokens = max(tokens // 2, longest)
        yield _with(setup, training__micro_batch_tokens=tokens)


def _checkpointing(setup: Setup) -> Iterator[Setup]:
    if setup.config.training.activation_checkpointing not in ("auto", "full"):
        yield _with(setup, training__activation_checkpointing="full")


def _adapter(setup: Setup) -> Iterator[Setup]:
    """Adapters instead of all weights; then the base in 4 bits."""
    adapter = setup.config.adapter
    if adapter is None:
        yield _with(setup, adapter="lora")
        yield _with(setup, adapter={"name": "lora", "quantize": "nf4"})
    elif adapter.quantize is None:
        yield _with(setup, adapter__quantize="nf4")


def _eight_bit(setup: Setup) -> Iterator[Setup]:
    if setup.config.optim.name == "adamw":
        yield _with(setup, optim__name="adamw_8bit")


def _cheaper_reference(setup: Setup) -> Iterator[Setup]:
    """A reference that is no second model."""
    if setup.config.reference_mode != "frozen":
        return
    # A divergence compares whole distributions, which are not cached.
    if "kl" not in getattr(setup.config.build_loss(), "columns", ()):
        yield _with(setup, reference="cached")
    elif setup.config.adapter is not None:
        yield _with(setup, reference="adapter")


def _shorter(setup: Setup) -> Iterator[Setup]:
    """Halve `data.max_length`, then halve it again, where that cuts the longest group."""
    for divisor in (2, 4):
        max_length = setup.config.data.max_length // divisor
        truncated = setup.lengths.truncate(max_length)
        longest = setup.lengths.padded_lengths.max()
        if len(truncated) and truncated.padded_lengths.max() < longest:
            shorter = replace(setup, lengths=truncated)
            values: dict[str, Any] = {"data__max_length": max_length}
            tokens = setup.config.training.micro_batch_tokens
            if tokens != "auto":
                values["training__micro_batch_tokens"] = min(tokens, _longest_group(shorter))
            yield _with(shorter, **values)


def _more_ranks(setup: Setup) -> Iterator[Setup]:
    """Twice, four and eight times as many ranks, which share one copy of the model."""
    for factor in (2, 4, 8):
        ranks = factor * setup.ranks
        wider = _with(setup, parallel__shard=None, parallel__replicate=None)
        yield replace(wider, ranks=ranks, changes=(*setup.changes, f"--ranks {ranks}"))


CHANGES: tuple[Change, ...] = (
    _smaller_batches,
    _checkpointing,
    _adapter,
    _eight_bit,
    _cheaper_reference,
    _shorter,
    _more_ranks,
)
