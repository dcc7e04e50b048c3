"""Changes of a config that make it fit, the cheapest first.

A change's cost is that of a step: seconds times devices. Each is tried alone; where none is enough,
any two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import yaml

from fastpref import config as configs
from fastpref.config import Config
from fastpref.data.batch_plan import tokens_of
from fastpref.model.batch_layout import wanted_layout
from fastpref.plan.predict import Prediction, Predictor
from fastpref.plan.workload import Sizes
from fastpref.utils.errors import UserError

SHOWN = 3


@dataclass(frozen=True)
class Setup:
    """What a prediction is made of, and the changes that led to it, as one would type them."""

    config: Config
    sizes: Sizes
    ranks: int
    changes: tuple[str, ...] = ()

    def set(self, **values: Any) -> Setup:
        """With fields `section__key` of the config changed; raises ConfigError."""
        raw = yaml.safe_load(self.config.to_yaml())
        for name, value in values.items():
            section, _, key = name.partition("__")
            if key:
                raw[section][key] = value
            else:
                raw[section] = value
        words = [f"{name.replace('__', '.')}={_typed(value)}" for name, value in values.items()]
        return replace(self, config=configs.parse(raw), changes=(*self.changes, *words))


def _typed(value: Any) -> str:
    """A value as one types it."""
    if not isinstance(value, dict):
        return str(value)
    return "'" + yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip() + "'"


Change = Callable[[Setup], Iterator[Setup]]  # settings to try in turn, until one fits


def fitting(predict: Predictor, setup: Setup) -> list[tuple[Setup, Prediction]]:
    """The cheapest changes, at most `SHOWN`, after which the run fits."""
    for size in (1, 2):
        found = []
        for changes in combinations(CHANGES, size):
            first = _first_that_fits(predict, setup, changes)
            found += [] if first is None else [first]
        if found:
            return sorted(found, key=lambda each: each[1].cost)[:SHOWN]
    return []


def _first_that_fits(
    predict: Predictor, setup: Setup, changes: tuple[Change, ...]
) -> tuple[Setup, Prediction] | None:
    change, *rest = changes
    for changed in change(setup):
        if rest:
            found = _first_that_fits(predict, changed, tuple(rest))
            if found is not None:
                return found
            continue
        try:
            predicted = predict(changed.config, changed.sizes, changed.ranks)
        except UserError:  # not a config that can run
            continue
        if predicted.fits:
            return changed, predicted
    return None


def _smaller_batches(setup: Setup) -> Iterator[Setup]:
    """Half of `training.micro_batch_tokens`, and so on, down to what the longest group needs."""
    layout = wanted_layout(setup.config)
    longest = int(tokens_of(setup.sizes, layout).max())  # type: ignore[arg-type]
    tokens = setup.config.training.micro_batch_tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield setup.set(training__micro_batch_tokens=tokens)


def _checkpointing(setup: Setup) -> Iterator[Setup]:
    if setup.config.training.activation_checkpointing != "full":
        yield setup.set(training__activation_checkpointing="full")


def _adapter(setup: Setup) -> Iterator[Setup]:
    """Adapters instead of all weights; then the base in 4 bits."""
    adapter = setup.config.adapter
    if adapter is None:
        yield setup.set(adapter="lora")
        yield setup.set(adapter={"name": "lora", "quantize": "nf4"})
    elif adapter.quantize is None:
        yield setup.set(adapter__quantize="nf4")


def _eight_bit(setup: Setup) -> Iterator[Setup]:
    if setup.config.optim.name == "adamw":
        yield setup.set(optim__name="adamw_8bit")


def _cached_reference(setup: Setup) -> Iterator[Setup]:
    if setup.config.reference_mode == "frozen":
        yield from (setup.set(reference=mode) for mode in _modes(setup))


def _shorter(setup: Setup) -> Iterator[Setup]:
    """Half of `data.max_length`, twice, where that cuts the longest group."""
    for part in (2, 4):
        length = setup.config.data.max_length // part
        cut = setup.sizes.cut(length)
        if len(cut) and cut.padded_lengths.max() < setup.sizes.padded_lengths.max():
            longest = int(tokens_of(cut, wanted_layout(setup.config)).max())  # type: ignore[arg-type]
            tokens = min(setup.config.training.micro_batch_tokens, longest)
            shorter = setup.set(data__max_length=length, training__micro_batch_tokens=tokens)
            yield replace(shorter, sizes=cut)


def _more_ranks(setup: Setup) -> Iterator[Setup]:
    """Twice as many, up to eight times, that share one copy of the model."""
    for factor in (2, 4, 8):
        ranks = factor * setup.ranks
        wider = setup.set(parallel__shard=None, parallel__replicate=None)
        yield replace(wider, ranks=ranks, changes=(*setup.changes, f"--ranks {ranks}"))


def _modes(setup: Setup) -> Iterator[str]:
    columns = getattr(setup.config.build_loss(), "columns", ())
    if "kl" not in columns:  # which compares whole distributions
        yield "cached"
    elif setup.config.adapter is not None:
        yield "adapter"


CHANGES: tuple[Change, ...] = (
    _smaller_batches,
    _checkpointing,
    _adapter,
    _eight_bit,
    _cached_reference,
    _shorter,
    _more_ranks,
)
