"""The objectives by name: `build` makes one, `describe` explains it."""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastpref.losses import (
    anchored,
    base,
    batchwise,
    combined,
    groupwise,
    margin,
    normalized,
    on_policy,
    pointwise,
    reward,
    rollout,
    token_level,
    wrappers,
)
from fastpref.losses.base import Kind
from fastpref.losses.groupwise import GroupwiseLoss
from fastpref.losses.kinds import Objective
from fastpref.losses.pointwise import PointwiseLoss
from fastpref.losses.token_level import TokenLevelLoss
from fastpref.utils.lazy_torch import Tensor

NOTATION = (
    "z, r: summed log-probs under policy and reference; t = z - r; a = z / tokens; "
    "pairs: w chosen, l rejected; tokens i: t is the sum of c_i * t_i, c_i their weight in the "
    "data, D that of their KL(reference || policy); single responses: y is 1 if desirable, else "
    "-1, w the weight of that class; groups: responses i, j of N; S logistic function, LS its "
    "logarithm, S' its derivative; sg(x) x as a constant; K(x) = -(LS(x) + LS(-x)) / 2 - log 2; "
    "[...] is 1 where the condition holds, else 0"
)


BY_NAME: dict[str, type[Objective]] = {
    objective.name: objective
    for module in (
        margin,
        anchored,
        batchwise,
        normalized,
        token_level,
        pointwise,
        groupwise,
        on_policy,
    )
    for objective in module.OBJECTIVES
}
# Objectives of reward models, which `names` does not list.
OF_REWARDS: dict[str, type[Objective]] = {
    objective.name: objective for objective in reward.OBJECTIVES
}
# Objectives of `fastpref rounds` alone, which `names` does not list either.
OF_ROLLOUTS: dict[str, type[Objective]] = {
    objective.name: objective for objective in rollout.OBJECTIVES
}


@dataclass(frozen=True)
class Description:
    """Documentation of an objective, as plain text, and its default parameters."""

    name: str
    kind: Kind
    # Whether it reads a response as one sum or token by token.
    level: Literal["sequence", "token"]
    summary: str
    formula: str
    incentives: str
    source: str
    # When to choose it, in place of what, and what it risks.
    use: str
    # Paragraphs on the rewards, the optimum, and differences from other implementations.
    notes: str
    defaults: dict[str, Any]
    needs_reference: bool


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names, of all kinds or of one, that `build` and a config's `loss: {name: ...}` accept.

    Without those of reward models and on rollouts, see `reward_names` and `rollout_names`.
    """
    return tuple(name for name, objective in BY_NAME.items() if kind in (None, objective.kind))


def reward_names() -> tuple[str, ...]:
    """The names of the objectives of reward models, which `build` accepts, too."""
    return tuple(OF_REWARDS)


def rollout_names() -> tuple[str, ...]:
    """The names of the objectives of `fastpref rounds` alone, which `build` accepts, too."""
    return tuple(OF_ROLLOUTS)


def build(name: str, **parameters: Any) -> Objective:
    """The objective called `name`; parameters that are left out keep their defaults.

    Options of many objectives (`wrappers.OPTIONS`) are parameters, too; with an option that looks
    at tokens, a PairwiseLoss becomes a TokenLevelLoss. Raises ValueError for an unknown name, an
    unknown parameter, a value out of range and an option that does not apply.
    """
    objective = _find(name)
    if objective.name in {**OF_REWARDS, **OF_ROLLOUTS}:
        return _build_without_options(objective, parameters)
    return wrappers.build_with_options(objective, parameters)


def _build_without_options(objective: type[Objective], parameters: dict[str, Any]) -> Objective:
    """An objective of reward models or on rollouts; raises ValueError for the options of others."""
    accepted = [field.name for field in fields(objective)]
    for parameter in parameters:
        if parameter not in accepted:
            raise ValueError(
                f"{parameter}: not a parameter of {objective.name}, which accepts "
                f"{', '.join(accepted) or 'none'}"
            )
    built: Objective = objective(**parameters)
    return built


def from_config(value: dict[str, Any] | list[dict[str, Any]]) -> Objective:
    """The objective of a config: a mapping with its name, or a list of mappings to be added up.

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
    # A labeled line, with the indented lines that continue it.
    labeled = dict(re.findall(r"^(\w+): +(.+(?:\n +.+)*)", doc, flags=re.MULTILINE))
    stated = {label: " ".join(text.split()) for label, text in labeled.items()}
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
    objective: Objective, policy: Any, reference: Any = None, reference_point: Tensor | None = None
) -> Any:
    """The scalars by which an objective scales the scores of the responses, by autograd.

    With s the gradient of a response's log-prob, -grad L is the sum of d_w * s_w - d_l * s_l over
    pairs and of d * s over single responses and over those of groups. Pairwise: (d_w, d_l), each
    (B,), or at the level of tokens -dL/dlogps of each, (T,), without the gradient through
    `policy.kl`; pointwise and groupwise: d, (S,). Only `kto` and `bco` take a reference point.
    Source: the incentive-score decomposition, arXiv:2604.18239.
    """
    if isinstance(objective, PointwiseLoss):
        return pointwise.pointwise_incentives(objective, policy, reference, reference_point)
    if isinstance(objective, GroupwiseLoss):
        return groupwise.groupwise_incentives(objective, policy, reference)
    if isinstance(objective, TokenLevelLoss):
        return token_level.token_incentives(objective, policy, reference)
    return base.incentives(objective, policy, reference)


def _find(name: str) -> type[Objective]:
    known = {**BY_NAME, **OF_REWARDS, **OF_ROLLOUTS}
    if isinstance(name, str) and name in known:
        return known[name]
    nearest = difflib.get_close_matches(str(name).lower(), known) or list(BY_NAME)
    raise ValueError(f"name: no objective is called {name!r}; known: {', '.join(nearest)}")
