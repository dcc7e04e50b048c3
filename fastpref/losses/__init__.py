"""Preference objectives: `build("dpo", beta=0.05)` makes one, `describe("dpo")` explains it."""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, fields
from typing import Any

from fastpref.losses import anchored, batchwise, margin, normalized
from fastpref.losses.base import Loss, LossOutput, PairwiseLoss, incentives

__all__ = [
    "NOTATION",
    "Description",
    "Loss",
    "LossOutput",
    "PairwiseLoss",
    "build",
    "describe",
    "incentives",
    "names",
]

NOTATION = (
    "z, r: summed log-probs under policy and reference; t = z - r; a = z / tokens; "
    "w chosen, l rejected; S logistic function, LS its logarithm, S' its derivative; "
    "[...] is 1 where the condition holds, else 0"
)

_BY_NAME = {
    objective.name: objective
    for module in (margin, anchored, batchwise, normalized)
    for objective in module.OBJECTIVES
}


@dataclass(frozen=True)
class Description:
    """What there is to know about an objective, as plain text and its default parameters."""

    name: str
    summary: str
    formula: str
    incentives: str
    source: str
    defaults: dict[str, Any]
    needs_reference: bool


def names() -> tuple[str, ...]:
    """The names that `build` and a config's `loss: {name: ...}` accept."""
    return tuple(_BY_NAME)


def build(name: str, **parameters: Any) -> PairwiseLoss:
    """The objective called `name`; parameters that are left out keep their defaults.

    Raises ValueError for an unknown name, an unknown parameter or a value out of range.
    """
    objective = _find(name)
    accepted = [field.name for field in fields(objective)]
    for parameter in parameters:
        if parameter not in accepted:
            known = ", ".join(accepted) or "none"
            raise ValueError(f"{parameter}: not a parameter of {name}, which accepts {known}")
    return objective(**parameters)


def describe(name: str) -> Description:
    """The documentation of the objective called `name`, with its default parameters.

    Raises ValueError for an unknown name.
    """
    objective = _find(name)
    doc = inspect.getdoc(objective) or ""
    # A labelled line and the indented lines that continue it.
    labelled = dict(re.findall(r"^(\w+): +(.+(?:\n +.+)*)", doc, flags=re.MULTILINE))
    stated = {label: " ".join(text.split()) for label, text in labelled.items()}
    return Description(
        name=objective.name,
        summary=doc.partition("\n")[0],
        formula=stated.get("loss", ""),
        incentives=stated.get("incentives", ""),
        source=stated.get("source", ""),
        defaults={field.name: field.default for field in fields(objective)},
        needs_reference=objective().needs_reference,
    )


def _find(name: str) -> type[PairwiseLoss]:
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    nearest = difflib.get_close_matches(str(name).lower(), _BY_NAME) or list(_BY_NAME)
    raise ValueError(f"name: no objective is called {name!r}; known: {', '.join(nearest)}")
