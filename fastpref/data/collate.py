"""Collate groups (pairs, labeled responses or scored responses) into tensors of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.attention import Segments
from fastpref.data.batch_plan import Layout
from fastpref.data.dataset import Ids, TokenGroup
from fastpref.data.packing import pack_groups
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import Kind, Logps


@dataclass(frozen=True)
class Batch:
    """G groups as S sequences, one for each response.

    The responses of a group are adjacent, except that pairs are ordered chosen_0 … chosen_{B-1},
    rejected_0 … rejected_{B-1}. The sequences fill R rows of L positions: either one row per
    sequence, padded on the right (a causal model needs no mask, since no token attends to later
    ones), or a single row that packs all of them.
    """

    input_ids: Tensor  # (R, L) int64
    predictor_positions: Tensor  # (T,) int64, flat positions in (R · L) that predict the labels
    labels: Tensor  # (T,) int64, the completion tokens of all sequences, in order
    label_positions: Tensor  # (T,) int64, flat positions in (R · L) of the labels themselves
    cu_seqlens: Tensor  # (S + 1,) int64, labels of sequence s: [cu_seqlens[s], cu_seqlens[s + 1])
    lengths: Tensor  # (S,) int64, completion tokens of each sequence
    cu_groups: Tensor  # (G + 1,) int64, offsets of the groups' responses
    targets: Tensor | None  # fp64: p of each pair (B,) or None; label or score of responses (S,)
    token_weights: Tensor | None  # (T,) fp32, weight of each label; None: all 1
    responses: Tensor  # (S,) int64, index of each sequence among all responses of the data set
    kind: Kind
    tokens: int  # unpadded tokens of all sequences
    chosen_tokens: int  # of pairs: completion tokens of the chosen responses, which come first
    position_ids: Tensor | None = None  # (1, L) int64, positions in the sequences of a packed row
    segments: Segments | None = None  # segments of a packed row
    row_lengths: tuple[int, ...] | None = None  # (R,) tokens of each padded row
    margins: Tensor | None = None  # (B,) fp64, margin of each pair, in which all have one

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        # Copies from pinned memory are asynchronous.
        tensors = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Batch(**{**vars(self), **tensors})

    def view(self, logps: Tensor) -> Logps:
        """Wrap the sequence log-probs (S,) as the input of objectives of this kind."""
        if self.kind == "pairwise":
            return SequenceLogps.from_sequences(logps, self.lengths, self.targets, self.margins)
        assert self.targets is not None
        if self.kind == "pointwise":
            return UnpairedLogps(logps, self.lengths, self.targets.bool())
        return GroupedLogps(logps, self.lengths, self.cu_groups, self.targets)

    def token_view(self, logps: Tensor, **columns: Tensor | None) -> TokenLogps:
        """Wrap the token log-probs (T,) of pairs, with `columns`, for token-level objectives.

        Token weights of the data are included, in the dtype of the log-probs.
        """
        weights = None if self.token_weights is None else self.token_weights.to(logps.dtype)
        return TokenLogps(
            logps, self.cu_seqlens, self.targets, weights=weights, margin=self.margins, **columns
        )


def collate(
    groups: Sequence[TokenGroup], kind: Kind = "pairwise", layout: Layout = "padded"
) -> Batch:
    """Build the tensors of one forward pass over the groups."""
    members = [(group, k) for group in groups for k in range(len(group.responses))]
    if kind == "pairwise":
        members.sort(key=lambda member: member[1])  # stable: all chosen, then all rejected
    sequences = [(group.prompt, group.responses[k]) for group, k in members]
    weights = [group.token_weights[k] for group, k in members if group.token_weights is not None]
    rows: dict[str, Any]
    if layout == "padded":
        rows = _padded(sequences)
    else:
        group_index = {id(group): g for g, group in enumerate(groups)}
        indices = [(group_index[id(group)], k) for group, k in members]
        rows = pack_groups(groups, indices, share=layout == "prefix_shared")._asdict()
    targets = [label for group in groups for label in group.labels or ()]
    margins = [group.margin for group in groups if group.margin is not None]
    labels = torch.from_numpy(np.concatenate([r for _, r in sequences]).astype(np.int64))
    lengths = [len(response) for _, response in sequences]
    if any(group.mask is not None for group in groups):
        # Tokens that are not scored are in no label, so nothing is computed for them in the head.
        masks = [
            np.ones(size, dtype=np.bool_) if group.mask is None else group.mask
            for (group, _), size in zip(members, lengths, strict=True)
        ]
        scored = torch.from_numpy(np.concatenate(masks).nonzero()[0])
        labels, lengths = labels[scored], [int(mask.sum()) for mask in masks]
        for name in ("predictor_positions", "label_positions"):
            rows[name] = rows[name][scored]
    return Batch(
        **rows,
        labels=labels,
        cu_seqlens=_offsets(lengths),
        lengths=torch.tensor(lengths),
        cu_groups=_offsets([len(group.responses) for group in groups]),
        targets=torch.tensor(targets, dtype=torch.float64) if targets else None,
        token_weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        responses=torch.tensor([group.first + k for group, k in members]),
        margins=torch.tensor(margins, dtype=torch.float64) if margins else None,
        kind=kind,
        tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
        chosen_tokens=sum(len(group.responses[k]) for group, k in members if k == 0),
    )


def _padded(sequences: Sequence[tuple[Ids, Ids]]) -> dict[str, Any]:
    """One row per sequence of prompt and response, padded on the right with 0."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    label_positions = []
    for s, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[s, :end] = np.concatenate([prompt, response])
        label_positions.append(s * width + np.arange(len(prompt), end))
    positions = torch.from_numpy(np.concatenate(label_positions))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "predictor_positions": positions - 1,
        "label_positions": positions,
        "row_lengths": tuple(len(prompt) + len(response) for prompt, response in sequences),
    }


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def join(views: Sequence[Any]) -> Logps:
    """Concatenate the log-probs of all forward passes of a micro-batch."""
    joined: Logps = type(views[0]).cat(views)
    return joined
