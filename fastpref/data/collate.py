"""The tensors of one forward pass over groups: pairs, labelled responses or several scored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.batch_plan import Layout
from fastpref.data.dataset import Ids, TokenGroup
from fastpref.data.packing import Packing, lay_out
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import Kind, Logps


@dataclass(frozen=True)
class Batch:
    """G groups as S sequences, one for each response.

    The responses of a group are next to each other, except that pairs come as chosen_0 …
    chosen_{B-1}, rejected_0 … rejected_{B-1}. The sequences lie in R rows of L positions: each in
    one of its own, padded on the right (a causal model needs no mask: no token sees what follows
    it), or all packed in a single one.
    """

    input_ids: Tensor  # (R, L) int64
    positions: Tensor  # (T,) int64, flat positions in (R · L) whose hidden state predicts a label
    labels: Tensor  # (T,) int64, the completion tokens of all sequences, in order
    label_positions: Tensor  # (T,) int64, flat positions in (R · L) of the labels themselves
    cu_seqlens: Tensor  # (S + 1,) int64, sequence s owns labels[cu_seqlens[s]:cu_seqlens[s+1]]
    lengths: Tensor  # (S,) int64, completion tokens of each sequence
    cu_groups: Tensor  # (G + 1,) int64, offsets of the groups' responses
    targets: Tensor | None  # fp64: p of each pair (B,) or None; label or score of responses (S,)
    token_weights: Tensor | None  # (T,) fp32, how much each label counts; None: all alike
    responses: Tensor  # (S,) int64, position of each sequence among all responses of the data
    kind: Kind
    tokens: int  # unpadded tokens of all sequences
    position_ids: Tensor | None = None  # (1, L) int64, positions in the sequences of a packed row
    packing: Packing | None = None  # what a packed row is made of

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        # From pinned memory a copy waits for nothing.
        tensors = {
            k: v.pin_memory().to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return Batch(**{**vars(self), **tensors})

    def view(self, logps: Tensor) -> Logps:
        """Log-probs of the sequences, (S,), as objectives of this kind take them."""
        if self.kind == "pairwise":
            return SequenceLogps.from_sequences(logps, self.lengths, self.targets)
        assert self.targets is not None
        if self.kind == "pointwise":
            return UnpairedLogps(logps, self.lengths, self.targets.bool())
        return GroupedLogps(logps, self.lengths, self.cu_groups, self.targets)

    def token_view(self, logps: Tensor, **columns: Tensor | None) -> TokenLogps:
        """Log-probs of the labels of pairs, (T,), and further columns, for token-level objectives.

        Where the data has token weights they are among them, in the dtype of the log-probs.
        """
        weights = None if self.token_weights is None else self.token_weights.to(logps.dtype)
        return TokenLogps(logps, self.cu_seqlens, self.targets, weights=weights, **columns)


def collate(
    groups: Sequence[TokenGroup], kind: Kind = "pairwise", layout: Layout = "padded"
) -> Batch:
    """Tensors of one forward pass over the groups."""
    members = [(group, k) for group in groups for k in range(len(group.responses))]
    if kind == "pairwise":
        members.sort(key=lambda member: member[1])  # stable: all chosen, then all rejected
    sequences = [(group.prompt, group.responses[k]) for group, k in members]
    weights = [group.token_weights[k] for group, k in members if group.token_weights is not None]
    rows: dict[str, Any]
    if layout == "padded":
        rows = _padded(sequences)
    else:
        order = {id(group): g for g, group in enumerate(groups)}
        places = [(order[id(group)], k) for group, k in members]
        rows = lay_out(groups, places, share=layout == "prefix_shared")._asdict()
    targets = [label for group in groups for label in group.labels or ()]
    return Batch(
        **rows,
        labels=torch.from_numpy(np.concatenate([r for _, r in sequences]).astype(np.int64)),
        cu_seqlens=_offsets([len(response) for _, response in sequences]),
        lengths=torch.tensor([len(response) for _, response in sequences]),
        cu_groups=_offsets([len(group.responses) for group in groups]),
        targets=torch.tensor(targets, dtype=torch.float64) if targets else None,
        token_weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        responses=torch.tensor([group.first + k for group, k in members]),
        kind=kind,
        tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
    )


def _padded(sequences: Sequence[tuple[Ids, Ids]]) -> dict[str, Tensor]:
    """One row for each sequence, a prompt and a response."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    own = []
    for s, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[s, :end] = np.concatenate([prompt, response])
        own.append(s * width + np.arange(len(prompt), end))
    places = torch.from_numpy(np.concatenate(own))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "positions": places - 1,
        "label_positions": places,
    }


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def join(views: Sequence[Any]) -> Logps:
    """The log-probs of all forward passes of a micro-batch, views of one kind, as one."""
    joined: Logps = type(views[0]).cat(views)
    return joined
