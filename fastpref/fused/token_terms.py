"""Log-probs and log-sum-exps of tokens for cross entropies, of the scored tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref import ops
from fastpref.fused.scored_tokens import fused_operands
from fastpref.ops import IGNORE_INDEX
from fastpref.ops.cross_entropy import CrossEntropyTerms, cross_entropy_terms


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Terms of T tokens out of N positions.

    labels: (T,), -100 where ignored.
    logps: (T,) log-probs of the labels, nats, 0 where ignored.
    rest: the other terms, where they were requested.
    positions: (T,) of the tokens among the N, or None where these are the same.
    """

    labels: Tensor
    logps: Tensor
    rest: CrossEntropyTerms | None
    positions: Tensor | None
    size: int

    @property
    def scored(self) -> Tensor:  # (T,) bool
        return self.labels != IGNORE_INDEX

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:  # (N,)
        """Values (T,) of the tokens at their positions, and `fill` at the others."""
        if self.positions is None:
            return values
        empty = values.new_full((self.size,), fill)
        return empty.index_copy(0, self.positions, values)


def token_terms(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    class_weights: Tensor | None = None,  # (V,)
    only_logps: bool = False,
) -> TokenTerms:
    """Terms of the tokens that are scored; under autocast in the dtype of a linear layer.

    With `only_logps` they come from the fastest implementation of `ops.linear_logps`. Selecting the
    tokens waits for the GPU; inside `torch.compile` all tokens are computed. Raises ValueError as
    the ops do.
    """
    labels = labels.flatten().masked_fill(labels.flatten() == ignore_index, IGNORE_INDEX)
    rows, size, positions = hidden.flatten(0, -2), len(labels), None
    if not torch.compiler.is_compiling():
        positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if len(positions) == size:
            positions = None
    if positions is not None:
        rows, labels = rows.index_select(0, positions), labels.index_select(0, positions)
    rows, weight, bias = fused_operands(rows, weight, bias)
    if only_logps:
        logps = ops.linear_logps(rows, weight, labels, bias=bias, softcap=softcap)
        return TokenTerms(labels, logps, None, positions, size)
    terms = cross_entropy_terms(
        rows, weight, labels, bias=bias, class_weights=class_weights, softcap=softcap
    )
    return TokenTerms(labels, terms.logps, terms, positions, size)


def check_operands(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, names: tuple[str, ...]
) -> None:
    """Raise ValueError, by the caller's names, where shapes or dtypes do not fit together.

    names: those of hidden, weight, labels and bias.
    """
    for name, tensor in zip(names, (hidden, weight, labels, bias), strict=True):
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name}: got a DTensor, of which this rank holds a shard; call the loss inside "
                f"the forward of the FSDP module that owns it, where it is gathered"
            )
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]}: expected shape (V, D) and {names[0]} of shape (..., D), "
            f"got {tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{names[2]}: expected shape {tuple(hidden.shape[:-1])}, one per row of {names[0]}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{names[2]}: expected int64 or int32, got {labels.dtype}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"{names[1]}: expected {hidden.dtype} like {names[0]}, got {weight.dtype}; "
            f"cast one of them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[3]}: expected shape ({len(weight)},), one per row of {names[1]}, "
            f"got {tuple(bias.shape)}"
        )
