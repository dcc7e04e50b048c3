"""Parts of the objectives that wrap others: the base, names, and errors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastpref.losses.base import Loss, PairwiseLoss


class Wrapper(Loss):
    """An objective that wraps another one, and needs what that one needs."""

    objective: Any  # a field of the subclasses

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the objective and of the option."""
        return named(self)

    @property
    def needs_reference(self) -> bool:
        needed: bool = self.objective.needs_reference
        return needed

    @property
    def needs_margin(self) -> bool:  # type: ignore[override]
        needed: bool = self.objective.needs_margin
        return needed


@dataclass(frozen=True)
class PairwiseWrapper(Wrapper, PairwiseLoss):
    """A pairwise objective that wraps another one."""

    objective: PairwiseLoss


def layers(objective: Any) -> list[Loss]:
    """An objective, what it wraps, what that wraps, and so on."""
    wrapped = [objective]
    while hasattr(wrapped[-1], "objective"):
        wrapped.append(wrapped[-1].objective)
    return wrapped


def named(wrapper: Any) -> str:
    """Name such as dpo(label_smoothing=0.1): the option, and details that are not the default."""
    option, *details = [field for field in fields(wrapper) if field.name != "objective"]
    shown = [option, *(d for d in details if getattr(wrapper, d.name) != d.default)]
    settings = ",".join(f"{field.name}={getattr(wrapper, field.name)}" for field in shown)
    inner = wrapper.objective.name
    return f"({inner})({settings})" if " " in inner else f"{inner}({settings})"


def check_pairwise(option: str, objective: Loss) -> None:
    """Raise ValueError unless the objective is one of pairs of summed log-probs."""
    if not isinstance(objective, PairwiseLoss):
        raise not_for(option, objective, "which is not one of pairs of summed log-probs")


def not_for(option: str, objective: Loss, why: str) -> ValueError:
    """Error for an option that does not apply to an objective."""
    return ValueError(f"{option}: does not apply to {objective.name}, {why}; leave it out")
