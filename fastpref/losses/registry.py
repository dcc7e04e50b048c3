"""The objectives by name: `build` makes one, `describe` explains it."""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import (
    anchored,
    base,
    batchwise,
    combined,
    groupwise,
    margin,
    normalized,
    pointwise,
    token_level,
    wrappers,
)
from fastpref.losses.base import Kind, Loss, LossOutput, PairwiseLoss
from fastpref.losses.groupwise import GroupwiseLoss, GroupwiseOutput
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.losses.token_level import TokenLevelLoss

# What objectives of the three kinds take, those on pairs at either level, and what they give.
Logps = SequenceLogps | TokenLogps | UnpairedLogps | GroupedLogps


Output = LossOutput | PointwiseOutput | GroupwiseOutput


NOTATION = (
    "z, r: summed log-probs under policy and reference; t = z - r; a = z / tokens; "
    "pairs: w chosen, l rejected; tokens i: t is the sum of c_i * t_i, c_i their weight in the "
    "data, D that of their KL(reference || policy); single responses: y is 1 if desirable, else "
    "-1, w the weight of that class; groups: responses i, j of N; S logistic function, LS its "
    "logarithm, S' its derivative; sg(x) x as a constant; K(x) = -(LS(x) + LS(-x)) / 2 - log 2; "
    "[...] is 1 where the condition holds, else 0"
)


_BY_NAME: dict[str, type[Loss]] = {
    objective.name: objective
    for module in (margin, anchored, batchwise, normalized, token_level, pointwise, groupwise)
    for objective in module.OBJECTIVES
}


@dataclass(frozen=True)
class Description:
    """What there is to know about an objective, as plain text and its default parameters."""

    name: str
    kind: Kind
    level: Literal["sequence", "token"]  # whether it sees a response as a sum or token by token
    summary: str
    formula: str
    incentives: str
    source: str
    use: str  # when to choose it, in place of what, and what it risks
    notes: str  # paragraphs: what the rewards are, where the optimum is, what differs elsewhere
    defaults: dict[str, Any]
    needs_reference: bool


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names that `build` and a config's `loss: {name: ...}` accept; those of one kind alone."""
    return tuple(name for name, objective in _BY_NAME.items() if kind in (None, objective.kind))


def build(name: str, **parameters: Any) -> Any:
    """The objective called `name`; parameters that are left out keep their defaults.

    It is a PairwiseLoss, PointwiseLoss or GroupwiseLoss, as its `kind` says; options of many
    objectives (`wrappers.OPTIONS`) are parameters, too, and those that look at tokens make it a
    TokenLevelLoss. Raises ValueError for an unknown name, an unknown parameter, a value out of
    range and an option that does not apply.
    """
    return wrappers.build_with_options(_find(name), parameters)


def from_config(value: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """The objective of a config: a mapping with its name, or a list of them to be added up.

    The sum is a PairwiseLoss, or a TokenLevelLoss if one of its parts is. Raises ValueError, naming
    the item of a list, as `build` does.
    """
    if isinstance(value, list):
        return combined.build_combined(value, build)
    return build(**value)


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
        kind=objective.kind,
        level="token" if issubclass(objective, TokenLevelLoss) else "sequence",
        summary=doc.partition("\n")[0],
        formula=stated.get("loss", ""),
        incentives=stated.get("incentives", ""),
        source=stated.get("source", ""),
        use=stated.get("use", ""),
        notes=doc.partition("\nsource:")[2].partition("\n\n")[2],
        defaults={field.name: field.default for field in fields(objective)},
        needs_reference=objective().needs_reference,
    )


def incentives(
    objective: Loss, policy: Any, reference: Any = None, reference_point: Tensor | None = None
) -> Any:
    """The scalars by which an objective scales the scores of the responses, by autograd.

    With s the gradient of a response's log-prob, -grad L is the sum of d_w * s_w - d_l * s_l over
    pairs and of d * s over single responses and over those of groups. Pairwise: (d_w, d_l), each
    (B,), or at the level of tokens -dL/dlogps of each, (T,), without the gradient through
    `policy.kl`; pointwise and groupwise: d, (S,). Only pointwise objectives take a reference point.
    Source: the incentive-score decomposition, arXiv:2604.18239.
    """
    if isinstance(objective, PointwiseLoss):
        return pointwise.pointwise_incentives(objective, policy, reference, reference_point)
    if isinstance(objective, GroupwiseLoss):
        return groupwise.groupwise_incentives(objective, policy, reference)
    if isinstance(objective, TokenLevelLoss):
        return token_level.token_incentives(objective, policy, reference)
    assert isinstance(objective, PairwiseLoss)
    return base.incentives(objective, policy, reference)


def pair_incentives(
    objective: Loss, policy: Any, reference: Any = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The incentives of any objective on pairs: d_w, d_l, each (B,), and token weights W (T,).

    With S the gradient of a response's sum_i W_i * log p_i, -grad L is the sum of
    d_w * S_w - d_l * S_l, without the gradient through `policy.kl`. At the level of sequences W is
    None, which means 1; at that of tokens it has mean 1 in each response, a constant.
    """
    if isinstance(objective, TokenLevelLoss):
        return token_level.token_pair_incentives(objective, policy, reference)
    assert isinstance(objective, PairwiseLoss)
    return *base.incentives(objective, policy, reference), None


def _find(name: str) -> type[Loss]:
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    nearest = difflib.get_close_matches(str(name).lower(), _BY_NAME) or list(_BY_NAME)
    raise ValueError(f"name: no objective is called {name!r}; known: {', '.join(nearest)}")
