"""Nash-MD: learning from preferences as a game of the policy against a mixture with the reference.

The opponent samples each token from the geometric mixture of both models, and a preference model
says how likely the policy's response beats the opponent's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.online.rollouts import Rollouts


@dataclass(frozen=True)
class NashMD:
    """Policy gradient of the game: raise responses that beat the opponent's more than half of them.

    loss:   −[P − 1/2 − beta * sg(D)] * log π(y), D = log π(y) − log π_ref(y)
    source: Munos et al. 2023, section 7, arXiv:2312.00886; TRL's default of beta

    P, in `Rollouts.rewards`, is the probability that y, sampled from the policy, is preferred to y'
    of the opponent. The gradient is exact for samples of the current policy, one optimizer step a
    round: there is no ratio and no clipping.

    mixture: share of the reference in the opponent (`mixture_logits`). At 0, self-play, the fixed
        point is the Nash equilibrium of the regularized game, π ∝ π_ref * exp(P(y ≻ π) / beta); a
        larger share has the fixed point π ∝ π_ref * exp(P(y ≻ mixture) / beta).
    per_token: multiply each token's log-ratio with its own log-prob alone, as TRL does, instead of
        the response's log-ratio with the response's log-prob. That drops the effect of a token on
        the log-ratios of other tokens.
    """

    beta: float = 0.1
    mixture: float = 0.5
    per_token: bool = False

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        rollouts.log_ratios()  # refuses rollouts without a reference
        outside = (rollouts.rewards < 0) | (rollouts.rewards > 1)
        if bool(outside.any()):
            raise ValueError(
                "rewards: Nash-MD takes probabilities in [0, 1] of beating the opponent, got "
                f"{rollouts.rewards[outside][0].item():g}; see `preference_of_rewards`"
            )
        return rollouts

    def loss(self, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None) -> Tensor:
        assert rollouts.ref_logps is not None
        advantages = (rollouts.rewards - 0.5).to(logps)
        log_ratios = (logps - rollouts.ref_logps).detach()
        if self.per_token:
            penalty = rollouts.sums(log_ratios * logps)
        else:
            penalty = rollouts.sums(log_ratios) * rollouts.sums(logps)
        return self.beta * penalty - advantages * rollouts.sums(logps)

    def divisor(self, lengths: Tensor) -> float:
        return len(lengths)


def preference_of_rewards(rewards: Tensor, opponents: Tensor) -> Tensor:
    """Probability of Bradley and Terry that a response beats its opponent's: σ(r(y) − r(y'))."""
    return torch.sigmoid(rewards - opponents)


def mixture_logits(policy: Tensor, reference: Tensor, mixture: float) -> Tensor:
    """Logits of the geometric mixture of two models, (…, V): weight `mixture` on the reference."""
    return (1 - mixture) * policy.log_softmax(-1) + mixture * reference.log_softmax(-1)
