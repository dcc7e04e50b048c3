"""Base of all objectives: soft labels, the reference policy, parameter checks, incentives.

An objective is a frozen dataclass whose fields are its hyperparameters and whose docstring states,
on labeled lines that `describe` reads, its loss, its incentives, its source, and its use: when to
choose it, in place of what, and what it risks. A subclass of `PairwiseLoss` writes two methods:
`reward`, the implicit reward of one response, and `hard_loss`, the loss of a pair whose first
response is certainly the better one.

Notation of the docstrings: zw, zl are the summed log-probs of the chosen and the rejected response
under the policy and rw, rl under the reference; nw, nl are their token counts; tw = zw - rw and
aw = zw / nw, likewise tl and al. S is the logistic function, S' its derivative S(x) * S(-x) and LS
its logarithm; [...] is 1 where the condition holds, else 0. d_w = -dL/dzw and d_l = dL/dzl are the
incentives. Losses are those of a hard label.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from fastpref.logps import SequenceLogps
from fastpref.utils.lazy_torch import Tensor, torch

Kind = Literal["pairwise", "pointwise", "groupwise"]


def number(
    default: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> Any:
    """A dataclass field that holds a finite number within bounds, checked when it is set."""
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        if math.isfinite(bound)
    ]

    def check(argument: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{argument}: must be a number, got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{argument}: must be finite, got {value}")
        if not (value > above and at_most >= value >= at_least and value < below):
            raise ValueError(f"{argument}: must be {' and '.join(bounds)}, got {value}")

    return _checked_field(default, check)


def choice(default: object, *others: object) -> Any:
    """A dataclass field that holds one of the listed values, checked when it is set."""
    accepted = (default, *others)

    def check(argument: str, value: object) -> None:
        if value not in accepted:
            options = ", ".join(repr(option) for option in accepted)
            raise ValueError(f"{argument}: must be one of {options}, got {value!r}")

    return _checked_field(default, check)


def _checked_field(default: object, check: Callable[[str, object], None]) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Per-pair results, each (B,) and never reduced; the rewards carry no gradient.

    metric_sums: (7,) fp64 sums over the pairs of loss, chosen and rejected rewards, chosen above
        rejected, their difference, and chosen and rejected log-probs, where a kernel computed them
        (`losses.evaluate`); else None. Leave them out of a copy with another loss.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metric_sums: Tensor | None = None


@dataclass(frozen=True)
class Loss(ABC):
    """A named objective; hyperparameters are checked once, when it is constructed."""

    name: ClassVar[str]
    # The data that it takes: pairs, single labeled responses, or scored groups.
    kind: ClassVar[Kind]
    # Whether it reads the column `margin` of the data.
    needs_margin: ClassVar[bool] = False
    # Whether it takes rewards of a reward model in place of log-probs, see `losses.reward`.
    of_rewards: ClassVar[bool] = False
    # Whether it takes samples with their tokens, and has no loss itself, see `losses.rollout`.
    of_rollouts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for parameter in fields(self):
            check = parameter.metadata.get("check")
            if check is not None:
                check(parameter.name, getattr(self, parameter.name))

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether log-probs of a reference policy enter the loss."""

    def refuse_reference_point(self, reference_point: Tensor | None) -> None:
        """Raise ValueError for a reference point, which only some pointwise objectives have."""
        if reference_point is not None:
            raise ValueError(
                f"reference_point: {self.name} has none, got a tensor of shape "
                f"{tuple(reference_point.shape)}; leave it out"
            )


@dataclass(frozen=True)
class PairwiseLoss(Loss):
    """An objective on preference pairs.

    With a soft label p (`policy.preference`), and L(w, l) the hard-label loss,

        L_p = p * L(chosen, rejected) + (1 - p) * L(rejected, chosen),

    which for a loss l(u) of an antisymmetric margin u is p * l(u) + (1 - p) * l(-u).

    An empty response adds nothing: its summed log-prob is 0, an empty sum, and its mean log-prob
    is defined as 0 with zero gradient. The pair still trains its other response.
    """

    kind: ClassVar[Kind] = "pairwise"
    # False where the loss of a pair depends on the rest of the batch: then it has no reversed pair.
    soft_labels: ClassVar[bool] = True

    @abstractmethod
    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        """The implicit reward of each response: (B,) log-probs, lengths and reference -> (B,).

        `reference` is all zeros for an objective that needs none.
        """

    @abstractmethod
    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        """The loss (B,) of pairs whose chosen response is certainly the better one."""

    def rewards(self, policy: SequenceLogps, reference: SequenceLogps) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and of the rejected responses, each (B,)."""
        return (
            self.reward(policy.chosen, policy.chosen_lengths, reference.chosen),
            self.reward(policy.rejected, policy.rejected_lengths, reference.rejected),
        )

    def margin(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        """Reward of the chosen response minus reward of the rejected one, (B,)."""
        chosen, rejected = self.rewards(policy, reference)
        return chosen - rejected

    def __call__(
        self,
        policy: SequenceLogps,
        reference: SequenceLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        """Loss and rewards of each pair.

        The reference is a constant: no gradient reaches it. It is ignored by an objective that
        does not need it. Raises ValueError when a needed reference is missing or has another
        number of pairs than the policy, when there are soft labels that the objective does not
        take, and for a reference point.
        """
        self.check(policy, reference, reference_point)
        reference = self.constant_reference(policy, reference)
        loss = self.hard_loss(policy, reference)
        if policy.preference is not None:
            reversed_loss = self.hard_loss(policy.swapped(), reference.swapped())
            loss = policy.preference * loss + (1 - policy.preference) * reversed_loss
        chosen, rejected = self.rewards(policy.detach(), reference)
        return LossOutput(loss, chosen, rejected)

    def check(
        self,
        policy: SequenceLogps,
        reference: SequenceLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        """Raise ValueError for arguments that `__call__` refuses."""
        if policy.preference is not None and not self.soft_labels:
            raise ValueError(
                f"preference: {self.name} does not take soft labels; leave them out "
                f"(`data: {{soft_labels: false}}`) or choose another objective"
            )
        if self.needs_reference:
            if reference is None:
                raise ValueError(
                    f"reference: {self.name} needs the log-probs of a reference policy, got None; "
                    f"set `reference: cached`"
                )
            if reference.chosen.shape != policy.chosen.shape:
                raise ValueError(
                    f"reference: expected {policy.chosen.numel()} pairs as in the policy, got "
                    f"shape {tuple(reference.chosen.shape)}; pass the same batch to both models"
                )
        self.refuse_reference_point(reference_point)

    def constant_reference(
        self, policy: SequenceLogps, reference: SequenceLogps | None
    ) -> SequenceLogps:
        """The reference without gradient, or zeros for an objective that needs none."""
        if self.needs_reference:
            assert reference is not None
            return reference.detach()
        return replace(
            policy,
            chosen=torch.zeros_like(policy.chosen),
            rejected=torch.zeros_like(policy.rejected),
        )


@dataclass(frozen=True)
class LogRatioLoss(PairwiseLoss):
    """A pairwise objective whose implicit reward is beta * t, zero where policy = reference."""

    needs_reference: ClassVar[bool] = True
    beta: float = number(0.1, above=0)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.beta * (logps - reference)


def incentives(
    objective: PairwiseLoss, policy: SequenceLogps, reference: SequenceLogps | None = None
) -> tuple[Tensor, Tensor]:
    """The two scalars per pair by which an objective scales the scores, each (B,), by autograd.

    d_w = -dL/dz_w and d_l = dL/dz_l, so that -grad L = d_w * s_w - d_l * s_l with s the gradient
    of a response's log-prob (incentive-score decomposition, arXiv:2604.18239).
    """
    with torch.enable_grad():
        chosen = policy.chosen.detach().requires_grad_()
        rejected = policy.rejected.detach().requires_grad_()
        loss = objective(replace(policy, chosen=chosen, rejected=rejected), reference).loss
        # An objective that ignores one response has gradient zero there, not none.
        d_chosen, d_rejected = torch.autograd.grad(
            loss.sum(), (chosen, rejected), materialize_grads=True
        )
    return -d_chosen, d_rejected
