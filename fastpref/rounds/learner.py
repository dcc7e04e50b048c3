"""The seam between sampling and training: scored samples of a round in, metrics out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class RoundSamples(NamedTuple):
    """Scored completions of one round, K for each of P prompts."""

    number: int  # of the round, from 1
    prompts: list[list[int]]  # P lists of token ids
    completions: list[list[list[int]]]  # P × K lists of token ids, end tokens included
    texts: list[list[str]]  # P × K, without special tokens
    finished: list[list[bool]]  # P × K; False: cut at max_new_tokens
    rewards: Tensor  # (P, K) fp64; for Nash-MD with a mixture the preferences to opponents


class Learner(Protocol):
    """Part of a round that changes the policy by the samples of the round."""

    def learn(self, round_: RoundSamples) -> dict[str, float]:
        """Take the optimizer steps of a round, and return its metrics.

        A round that was interrupted is learned again, from the newest checkpoint within it; the
        metrics must not depend on that.
        """
