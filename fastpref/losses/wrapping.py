"""Parts of the objectives that wrap others: the base, names, and errors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastpref.losses.base import Loss, PairwiseLoss


@dataclass(frozen=True)
class PairwiseWrapper(PairwiseLoss):
    """A pairwise objective that wraps another one; its name is that of the other and the option."""

    objective: PairwiseLoss

    @property
    def name(self) -> str:  # type: ignore[override]
        return named(self)

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    @property
    def needs_margin(self) -> bool:  # type: ignore[override]
        return self.objective.needs_margin


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
