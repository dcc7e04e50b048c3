"""A weighted sum of objectives on pairs, from a list in a config.

loss:
  - {name: dpo, weight: 0.8}
  - {name: sft, weight: 0.2, average: true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.losses import wrappers
from fastpref.losses.base import Loss, LossOutput, PairwiseLoss, number
from fastpref.losses.kinds import Objective
from fastpref.losses.token_level import TokenLevelLoss
from fastpref.losses.wrappers import TokenWeighted
from fastpref.utils.lazy_torch import Tensor, torch

_check_weight = number(1.0, above=0).metadata["check"]


@dataclass(frozen=True)
class Sum(Loss):
    """Base of sums of objectives: the parts with their weights, and the needs of all of them."""

    part_type: ClassVar[Any]
    parts: tuple[tuple[Any, float], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("parts: expected at least one objective with its weight, got none")
        for index, (objective, weight) in enumerate(self.parts):
            if not isinstance(objective, self.part_type):
                raise ValueError(
                    f"parts[{index}]: expected a {self.part_type.__name__}, got {objective!r}; "
                    f"`losses.from_config` adds up any objectives on pairs"
                )
            _check_weight(f"parts[{index}].weight", weight)

    @property
    def name(self) -> str:  # type: ignore[override]
        return " + ".join(f"{weight:g} {objective.name}" for objective, weight in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(objective.needs_reference for objective, _ in self.parts)

    @property
    def needs_margin(self) -> bool:  # type: ignore[override]
        return any(objective.needs_margin for objective, _ in self.parts)

    @property
    def soft_labels(self) -> bool:
        return all(objective.soft_labels for objective, _ in self.parts)

    def total(self, losses: list[Tensor]) -> Tensor:
        """The weighted sum (B,) of the losses (B,) of the parts."""
        weighted = [weight * loss for (_, weight), loss in zip(self.parts, losses, strict=True)]
        return torch.stack(weighted).sum(0)


@dataclass(frozen=True)
class WeightedSum(Sum, PairwiseLoss):  # type: ignore[override]
    """A sum of pairwise objectives, each times a positive weight.

    loss:       sum_k weight_k * L_k
    incentives: d_w = sum_k weight_k * d_w of L_k, d_l likewise
    source:     as mixed preference optimization, Wang et al. 2024, arXiv:2411.10442

    Rewards are those of the first objective. The weights need not add up to 1. A reference is
    needed if one of the objectives needs it, and soft labels are taken if all of them take them.
    """

    part_type: ClassVar[Any] = PairwiseLoss

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        first, _ = self.parts[0]
        # The reference of the sum is not zero where another part needs one.
        subtracted = reference if first.needs_reference else torch.zeros_like(reference)
        return first.reward(logps, lengths, subtracted)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        return self.total(
            [
                objective.hard_loss(policy, objective.constant_reference(policy, reference))
                for objective, _ in self.parts
            ]
        )


@dataclass(frozen=True)
class TokenLevelSum(Sum, TokenLevelLoss):  # type: ignore[override]
    """A sum of objectives on pairs that look at tokens, each times a positive weight.

    loss:       sum_k weight_k * L_k
    incentives: those of each token, sum_k weight_k * those of L_k
    source:     as `WeightedSum`

    As `WeightedSum`. A pairwise part is wrapped in `TokenWeighted`. The sum needs every column that
    one of its parts needs.
    """

    part_type: ClassVar[Any] = TokenLevelLoss

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part, _ in self.parts for name in part.columns))

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        self.check(policy, reference, reference_point)
        outputs = [objective(policy, reference, reference_point) for objective, _ in self.parts]
        return replace(outputs[0], loss=self.total([output.loss for output in outputs]))


def build_combined(items: object, build: Callable[..., Objective]) -> WeightedSum | TokenLevelSum:
    """The weighted sum of a config's list of objectives.

    items: mappings, each with the name of an objective, optionally its `weight` (1), its
        parameters and options.
    build: constructs an objective from its name and parameters, as `losses.build` does.

    The sum looks at tokens if one of the objectives does. Raises ValueError, naming the item, for a
    value that is not such a list, a weight that is not a finite number above 0, an objective that
    does not take pairs, and everything that `build` refuses.
    """
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(
            f"loss: expected a list such as [{{name: dpo, weight: 0.8}}, {{name: sft, weight: "
            f"0.2}}], got {items!r}"
        )
    parts = [_build_part(f"loss[{index}]", item, build) for index, item in enumerate(items)]
    if all(isinstance(objective, PairwiseLoss) for objective, _ in parts):
        return WeightedSum(tuple(parts))
    return TokenLevelSum(
        tuple(
            (TokenWeighted(objective) if isinstance(objective, PairwiseLoss) else objective, weight)
            for objective, weight in parts
        )
    )


def _build_part(
    where: str, item: object, build: Callable[..., Objective]
) -> tuple[PairwiseLoss | TokenLevelLoss, float]:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected e.g. {{name: dpo, weight: 0.8}}, got {item!r}")
    if "name" not in item:
        raise ValueError(f"{where}.name: is missing, e.g. {{name: dpo, weight: 0.8}}")
    parameters = dict(item)
    weight = parameters.pop("weight", 1.0)
    try:
        objective = build(**parameters)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    if objective.of_rewards:
        raise ValueError(
            f"{where}.name: {objective.name} is an objective of reward models, which are not "
            f"added up; use it alone"
        )
    if not isinstance(objective, PairwiseLoss | TokenLevelLoss):
        raise ValueError(
            f"{where}.name: {objective.name} is not an objective on pairs; only those can be added "
            f"up"
        )
    _check_weight(f"{where}.weight", weight)
    return objective, weight


def config_of(objective: Loss) -> dict[str, Any] | list[dict[str, Any]]:
    """Config that rebuilds an objective: a mapping, or a list for a weighted sum.

    A `TokenWeighted` objective has the config of the objective that it wraps.
    """
    if isinstance(objective, TokenWeighted):
        return config_of(objective.objective)
    if not isinstance(objective, Sum):
        return wrappers.config_of(objective)
    return [
        {"name": "", "weight": weight, **wrappers.config_of(part)}
        for part, weight in objective.parts
    ]
