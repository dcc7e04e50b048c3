"""Scored tokens of padded and packed batches: their labels, and selection of their rows.

S sequences of L positions, T scored or packed tokens. Labels are vocabulary indices, or
`ignore_index` where nothing is scored. `labels[t]` is the token that `hidden[t]` predicts, which
is the one after position t; with `shift` it is the token at position t itself, as in the labels of
Hugging Face models, and the first label of each sequence is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpref import ops
from fastpref.ops import IGNORE_INDEX
from fastpref.ops.bounds import offsets_in_range
from fastpref.ops.checks import check_offsets


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Labels of T tokens, sequence after sequence, and the positions of their hidden states.

    labels: (T,), on the device of the hidden states; -100 occurs only in a packed batch that
        includes unscored tokens.
    cu_seqlens: (S + 1,) offsets of the sequences among the T tokens.
    lengths: (S,) int64 number of scored tokens.
    positions: (T,) rows of the flattened hidden states, or None where these are the T rows.
    shift: whether the label of a hidden state stands one position further on.
    """

    labels: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    positions: Tensor | None = None
    shift: bool = False

    @classmethod
    def padded(
        cls,
        labels: Tensor,  # (S, L)
        device: torch.device,
        *,
        attention_mask: Tensor | None = None,  # (S, L), 0 where there is padding
        shift: bool = False,
        ignore_index: int = IGNORE_INDEX,
    ) -> ScoredTokens:
        """The scored tokens of a padded batch, for hidden states (S, L, D) on `device`.

        Their number is read from `labels`, which waits for the GPU unless the labels are on the
        CPU.
        """
        labels = _with_ignore_index(labels, ignore_index)
        if attention_mask is not None:
            attention_mask = attention_mask.to(labels.device)
            labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
        if shift:
            labels = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if shift and attention_mask is not None:
            # Left padding does not predict the first token.
            labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
        scored = labels != IGNORE_INDEX
        lengths = scored.sum(1)
        positions = scored.flatten().nonzero().squeeze(1)
        scored_labels = labels.flatten().index_select(0, positions)
        scored_labels, lengths, positions = (
            x.to(device, non_blocking=True) for x in (scored_labels, lengths, positions)
        )
        return cls(scored_labels, pad(lengths.cumsum(0), (1, 0)), lengths, positions, shift)

    @classmethod
    def packed(
        cls,
        labels: Tensor,  # (T,)
        cu_seqlens: Tensor,  # (S + 1,)
        *,
        shift: bool = False,
        ignore_index: int = IGNORE_INDEX,
        scored_only: bool = False,
    ) -> ScoredTokens:
        """All tokens of a packed batch; ignored tokens cost as much as scored ones.

        With `scored_only` ignored tokens are left out; selecting the others waits for the GPU.
        """
        check_offsets(cu_seqlens, labels)
        cu_seqlens = offsets_in_range(cu_seqlens, len(labels))
        labels = _with_ignore_index(labels, ignore_index)
        if shift and len(labels):
            last = (cu_seqlens[1:].long() - 1).remainder(len(labels))
            labels = labels.roll(-1).index_fill(0, last, IGNORE_INDEX)
        scored = labels != IGNORE_INDEX
        lengths = ops.segment_sum(scored.double(), cu_seqlens).long()
        if not scored_only:
            return cls(labels, cu_seqlens, lengths, None, shift)
        positions = scored.nonzero().squeeze(1)
        return cls(labels[positions], pad(lengths.cumsum(0), (1, 0)), lengths, positions, shift)

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden states (T, D) of the tokens, out of (S, L, D) or a packed (T, D)."""
        if self.positions is None:
            return hidden
        return hidden.flatten(0, -2).index_select(0, self.positions)

    def column(self, values: Tensor) -> Tensor:
        """Values (T,) of the tokens, out of (S, L) or a packed (T,), aligned with the labels."""
        values = values.flatten()
        if self.shift:
            values = values.roll(-1)
        return values if self.positions is None else values.index_select(0, self.positions)

    def token_logps(
        self,
        rows: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        logit_scale: float = 1.0,
        softcap: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # (T,)
        """Log-prob of each token; under autocast computed in the dtype of a linear layer.

        The gradient of an fp32 weight or bias is fp32, and not rounded. Raises ValueError as
        `ops.linear_logps` does.
        """
        rows, weight, bias = fused_operands(rows, weight, bias)
        return ops.linear_logps(
            rows,
            weight,
            self.labels,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            impl=impl,
        )

    def logps(
        self,
        rows: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        **options: Any,
    ) -> Tensor:  # (S,)
        """Summed log-prob of each sequence; options as in `token_logps`."""
        return ops.segment_sum(self.token_logps(rows, weight, bias, **options), self.cu_seqlens)


def fused_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands of `fastpref.ops`, which round a weight and bias of fp32 themselves under autocast.

    Those of other dtypes are cast as by `autocast_operands`.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    weight = weight if weight.dtype == torch.float32 else weight.to(dtype)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return hidden.to(dtype), weight, bias


def autocast_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast casts them for a linear layer; unchanged where it is off."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _with_ignore_index(labels: Tensor, ignore_index: int) -> Tensor:
    if ignore_index == IGNORE_INDEX:
        return labels
    return labels.masked_fill(labels == ignore_index, IGNORE_INDEX)
