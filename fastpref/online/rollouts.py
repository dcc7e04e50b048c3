"""Samples of a policy with all that an online objective needs to know of them.

S sampled responses, T response tokens, one response after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpref.logps import segment_offsets, segment_positions, segment_sum

# Columns with a value for each token, and for each response.
_TOKEN_COLUMNS = ("old_logps", "ref_logps", "values", "token_advantages", "returns")
_RESPONSE_COLUMNS = ("rewards", "advantages")


@dataclass(frozen=True, eq=False)
class Rollouts:
    """S responses that the policy sampled, and their T tokens; no column carries a gradient.

    cu_seqlens: (S + 1,) offsets of the responses among the tokens, none of them empty.
    old_logps: (T,) log-probs of the tokens under the policy that sampled them, nats.
    rewards: (S,) reward of each response. For Nash-MD it is the probability in [0, 1] that the
        response is preferred to its opponent.
    ref_logps: (T,) log-probs under the reference, nats.
    cu_groups: (G + 1,) offsets of the groups of responses to one prompt.
    values: (T,) estimate of the return from each token on, under the policy that sampled it.
    advantages, token_advantages, returns: what `prepare` of an objective adds.

    Raises ValueError if the shape of a column does not fit.
    """

    cu_seqlens: Tensor
    old_logps: Tensor
    rewards: Tensor
    ref_logps: Tensor | None = None
    cu_groups: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None  # (S,)
    token_advantages: Tensor | None = None  # (T,)
    returns: Tensor | None = None  # (T,)

    def __post_init__(self) -> None:
        responses = len(self.cu_seqlens) - 1
        for names, size in ((_TOKEN_COLUMNS, len(self.old_logps)), (_RESPONSE_COLUMNS, responses)):
            for name in names:
                column = getattr(self, name)
                if column is not None and column.shape != (size,):
                    raise ValueError(f"{name}: expected shape ({size},), got {tuple(column.shape)}")

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each response, (S,)."""
        return self.cu_seqlens.diff()

    def sums(self, values: Tensor) -> Tensor:
        """Sum of values (T,) over the tokens of each response, (S,)."""
        return segment_sum(values, self.cu_seqlens)

    def per_token(self, values: Tensor) -> Tensor:
        """Values (S,) of the responses, repeated for each of their tokens, (T,)."""
        return values[segment_positions(self.cu_seqlens, len(self.old_logps))[0]]

    def log_ratios(self) -> Tensor:
        """log π_old − log π_ref of each token, (T,), nats.

        Raises ValueError without log-probs of the reference.
        """
        if self.ref_logps is None:
            raise ValueError(
                "ref_logps: the KL penalty needs the reference's log-probs; "
                "pass them, or set its coefficient to 0"
            )
        return self.old_logps - self.ref_logps

    def groups(self) -> Tensor:
        """Offsets (G + 1,) of the groups; ValueError without them."""
        if self.cu_groups is None:
            raise ValueError(
                "cu_groups: expected the offsets of the groups of one prompt, got None"
            )
        return self.cu_groups

    def select(self, responses: Sequence[int] | Tensor) -> Rollouts:
        """Prepared responses of a minibatch, in this order, without their groups."""
        index = torch.as_tensor(responses, device=self.cu_seqlens.device)
        lengths = self.lengths[index]
        offsets = segment_offsets(lengths)
        moves = (self.cu_seqlens[index] - offsets[:-1]).repeat_interleave(lengths)
        tokens = torch.arange(len(moves), device=moves.device) + moves
        columns = dict.fromkeys(_TOKEN_COLUMNS, tokens) | dict.fromkeys(_RESPONSE_COLUMNS, index)
        selected: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name, rows in columns.items()
        }
        return replace(self, cu_seqlens=offsets, cu_groups=None, **selected)


class OnlineObjective(Protocol):
    """Objective on rollouts: `prepare` once a round, then `loss` on each minibatch."""

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Add advantages and returns; the groups must be complete."""

    def loss(self, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None) -> Tensor:
        """Loss of each response, (S,), of the policy's log-probs (T,) and values (T,)."""

    def divisor(self, lengths: Tensor) -> Tensor | float:
        """Divisor of the summed losses of the responses of a step with these lengths, (S,)."""


def mean_loss(
    objective: OnlineObjective, logps: Tensor, rollouts: Rollouts, values: Tensor | None = None
) -> Tensor:
    """Loss () of a minibatch that is a whole optimizer step."""
    total = objective.loss(logps, rollouts, values).sum()
    return total / objective.divisor(rollouts.lengths)
