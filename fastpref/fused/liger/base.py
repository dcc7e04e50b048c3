"""Log-probs of sequences and sums of logits, for all losses of the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.logps import mean_logps

Aux = tuple[Tensor, ...]


class Sequences(NamedTuple):  # each (S,)
    logps: Tensor  # sums, or means over the scored tokens
    sums: Tensor
    lengths: Tensor


class FusedLinearLoss(nn.Module):
    """Base of the losses: log-probs of sequences, and sums of logits."""

    def __init__(
        self, ignore_index: int, beta: float, compiled: bool, average: bool, chunk_size: int
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.average_log_prob = average
        self.chunk_size = chunk_size

    def _sequences(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
    ) -> Sequences:
        shape = tuple(hidden.shape)
        if len(shape) != 3:
            raise ValueError(f"_input: expected shape (S, L, D), got {shape}")
        if target.shape != shape[:2]:
            raise ValueError(f"target: expected shape {shape[:2]}, got {tuple(target.shape)}")
        tokens = ScoredTokens.padded(target, hidden.device, ignore_index=self.ignore_index)
        sums = tokens.logps(tokens.rows(hidden), weight, bias)
        logps = mean_logps(sums, tokens.lengths) if self.average_log_prob else sums
        return Sequences(logps, sums, tokens.lengths)

    @torch.no_grad()
    def _reference(
        self,
        hidden: Tensor,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        used: bool,
    ) -> Tensor | None:
        """The reference's log-probs, or None without one."""
        if (ref_input is not None, ref_weight is not None) != (used, used):
            raise ValueError(
                f"ref_input: expected ref_input and ref_weight where use_ref_model is True and "
                f"neither where it is False, got use_ref_model={used}"
            )
        if ref_input is None or ref_weight is None:
            return None
        if ref_input.shape[:2] != hidden.shape[:2]:
            expected = (*hidden.shape[:2], "E")
            raise ValueError(f"ref_input: expected {expected}, got {tuple(ref_input.shape)}")
        return self._sequences(ref_input, ref_weight, target, ref_bias).logps


@torch.no_grad()
def sums_of_logits(
    hidden: Tensor,  # (S, L, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (S,) float64
    """Sum of the logits over all positions of a sequence: (sum of hidden) . (sum of rows)."""
    sums = hidden.sum(1, dtype=torch.float64) @ weight.sum(0, dtype=torch.float64)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float64)
