"""Offset of the reward margin by a column of the data. Notation: see `base`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastpref.logps import SequenceLogps
from fastpref.losses.base import number
from fastpref.losses.wrapping import PairwiseWrapper, check_pairwise, not_for
from fastpref.utils.lazy_torch import Tensor, torch

# Objectives whose loss sees a pair through the difference of rewards linear in the log-probs.
OF_REWARDS = (
    *("dpo", "cdpo", "robust", "ipo", "hinge", "exo_pair", "discopop", "r_dpo", "bpo"),
    *("ipo_avg", "dpo_norm", "logpi_dpo", "pmo", "h_dpo", "simpo"),
)


@dataclass(frozen=True)
class Offset(PairwiseWrapper):
    """Reward offset: asks a larger reward margin of pairs whose column `margin` is larger.

    loss:       that of the objective with u - offset * m in place of the reward margin u, m the
                margin of the pair in the data
    incentives: those of the objective there
    source:     Amini et al. 2024 (ODPO), arXiv:2402.10571

    Rewards are those of the objective. On `dpo` the loss is -LS(u - offset * m): ODPO has for m the
    logarithm of the difference of the scores, reward models have the difference. The reversed pair
    of a soft label or of label smoothing has the margin -m. Only for objectives that see no more
    of a pair than the difference of its rewards. offset = 0 changes nothing.
    """

    offset: float = number(1.0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairwise("offset", self.objective)
        if self.objective.name not in OF_REWARDS:
            why = "whose loss is not one of the reward margin; it applies to "
            raise not_for("offset", self.objective, why + ", ".join(OF_REWARDS))

    @property
    def needs_margin(self) -> bool:  # type: ignore[override]
        return True

    def check(
        self,
        policy: SequenceLogps,
        reference: SequenceLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        super().check(policy, reference, reference_point)
        check_margin(self.name, policy)

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.objective.reward(logps, lengths, reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        check_margin(self.name, policy)
        assert policy.margin is not None
        zeros = torch.zeros_like(policy.chosen)
        # Reward of a nat, which is 0 for an empty response of an objective that averages.
        slope = self.objective.reward(zeros + 1, policy.chosen_lengths, zeros)
        demanded = self.offset * policy.margin.to(slope.dtype)
        shift = torch.where(slope == 0, zeros, demanded / torch.where(slope == 0, 1, slope))
        return self.objective.hard_loss(replace(policy, chosen=policy.chosen - shift), reference)


def check_margin(name: str, policy: SequenceLogps) -> None:
    """Raise ValueError for pairs without margins."""
    if policy.margin is None:
        raise ValueError(
            f"margin: {name} needs the margin of each pair, got None; add a column margin to the "
            "data, or leave offset out"
        )
