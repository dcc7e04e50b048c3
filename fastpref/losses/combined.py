"""A weighted sum of pairwise objectives, from a list in a config.

loss:
  - {name: dpo, weight: 0.8}
  - {name: sft, weight: 0.2, average: true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.logps import SequenceLogps
from fastpref.losses import wrappers
from fastpref.losses.base import Loss, PairwiseLoss, number

_check_weight = number(1.0, above=0).metadata["check"]


@dataclass(frozen=True)
class WeightedSum(PairwiseLoss):
    """A sum of pairwise objectives, each times a positive weight.

    loss:       sum_k weight_k * L_k
    incentives: d_w = sum_k weight_k * d_w of L_k, d_l likewise
    source:     as mixed preference optimization, Wang et al. 2024, arXiv:2411.10442

    Rewards are those of the first objective. The weights need not add up to 1. A reference is
    needed if one of the objectives needs it, and soft labels are taken if all of them take them.
    """

    parts: tuple[tuple[PairwiseLoss, float], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("parts: expected at least one objective with its weight, got none")
        for index, (objective, weight) in enumerate(self.parts):
            _check_part(f"parts[{index}]", objective, weight)

    @property
    def name(self) -> str:  # type: ignore[override]
        return " + ".join(f"{weight:g} {objective.name}" for objective, weight in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(objective.needs_reference for objective, _ in self.parts)

    @property
    def soft_labels(self) -> bool:  # type: ignore[override]
        return all(objective.soft_labels for objective, _ in self.parts)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        first, _ = self.parts[0]
        known = reference if first.needs_reference else torch.zeros_like(reference)
        return first.reward(logps, lengths, known)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        losses = [
            weight * objective.hard_loss(policy, objective.constant_reference(policy, reference))
            for objective, weight in self.parts
        ]
        return torch.stack(losses).sum(0)


def build_combined(items: object, build: Callable[..., Loss]) -> WeightedSum:
    """The weighted sum of a config's list of objectives.

    items: mappings, each with the name of an objective, optionally its `weight` (1) and its
        parameters.
    build: makes an objective from its name and parameters, as `losses.build` does.

    Raises ValueError, naming the item, for what is not such a list, a weight that is not a finite
    number above 0, an objective that is not pairwise, and whatever `build` refuses.
    """
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(
            f"loss: expected a list such as [{{name: dpo, weight: 0.8}}, {{name: sft, weight: "
            f"0.2}}], got {items!r}"
        )
    parts = []
    for index, item in enumerate(items):
        where = f"loss[{index}]"
        if not isinstance(item, Mapping):
            raise ValueError(f"{where}: expected e.g. {{name: dpo, weight: 0.8}}, got {item!r}")
        if "name" not in item:
            raise ValueError(f"{where}.name: is missing, e.g. {{name: dpo, weight: 0.8}}")
        parameters = dict(item)
        weight = parameters.pop("weight", 1.0)
        try:
            objective: Any = build(**parameters)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        _check_part(where, objective, weight)
        parts.append((objective, weight))
    return WeightedSum(tuple(parts))


def config_of(objective: Loss) -> dict[str, Any] | list[dict[str, Any]]:
    """What builds an objective again, as in a config: a mapping, or a list for a weighted sum."""
    if not isinstance(objective, WeightedSum):
        return wrappers.config_of(objective)
    return [
        {"name": "", "weight": weight, **wrappers.config_of(part)}
        for part, weight in objective.parts
    ]


def _check_part(where: str, objective: Loss, weight: object) -> None:
    if not isinstance(objective, PairwiseLoss):
        name = getattr(objective, "name", repr(objective))
        raise ValueError(
            f"{where}.name: {name} is not an objective on pairs of summed log-probs; only those "
            f"can be added up"
        )
    _check_weight(f"{where}.weight", weight)
