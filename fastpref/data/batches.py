"""The deterministic plan of which groups meet in which step, and the tensors of one forward pass.

A group is a pair, a labelled response or several scored ones. Step k is a function of (data,
batch_size, seed, k) alone: resuming needs no more than k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.formats import DataError
from fastpref.data.tokens import UNITS, Groups, Lengths, TokenGroup
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import Kind, Logps

Indices = list[int]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of `batch_size` groups, each split into micro-batches of `max_tokens`."""

    lengths: Lengths  # (N,) tokens of each group's longest prompt + response
    sizes: Lengths  # (N,) responses of each group
    batch_size: int
    max_tokens: int
    seed: int | None  # None: in the order of the data
    unit: str = "pair"  # what a group is called in messages

    def __post_init__(self) -> None:
        cost = int((self.sizes * self.lengths).max())
        if cost > self.max_tokens:
            raise DataError(
                f"training.max_tokens: {self.max_tokens:,} cannot hold the longest {self.unit} "
                f"({cost:,} padded tokens); raise it, or lower data.max_length"
            )

    @classmethod
    def of(cls, groups: Groups, batch_size: int, max_tokens: int, seed: int | None) -> Plan:
        sizes = np.diff(groups.offsets)
        return cls(groups.padded_lengths, sizes, batch_size, max_tokens, seed, UNITS[groups.kind])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def step(self, number: int) -> list[Indices]:
        """Micro-batches of the optimizer step `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        order = self._order(epoch)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        return pack(map(int, chosen), self.lengths, self.sizes, self.max_tokens)

    def epoch(self, number: int = 0) -> Iterator[list[Indices]]:
        """All steps of one epoch; every group comes exactly once."""
        first = number * self.steps_per_epoch
        return (self.step(first + k) for k in range(self.steps_per_epoch))

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))


def pack(
    indices: Iterable[int], lengths: Lengths, sizes: Lengths, max_tokens: int
) -> list[Indices]:
    """Micro-batches of groups whose padded tokens fit the budget; a larger group goes alone.

    Longest first, so that groups of like length share a micro-batch and its padding.
    """
    micro_batches: list[Indices] = []
    room = 0  # responses that still fit
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if sizes[index] > room:
            micro_batches.append([])
            room = max_tokens // int(lengths[index])
        micro_batches[-1].append(index)
        room -= int(sizes[index])
    return micro_batches


@dataclass(frozen=True)
class Batch:
    """G groups as S right-padded sequences, one for each response.

    The responses of a group are next to each other, except that pairs come as chosen_0 …
    chosen_{B-1}, rejected_0 … rejected_{B-1}. A causal model needs no mask for padding on the
    right: no token sees what follows it.
    """

    input_ids: Tensor  # (S, L) int64
    positions: Tensor  # (T,) int64, flat positions in (S · L) whose hidden state predicts a label
    labels: Tensor  # (T,) int64, the completion tokens of all sequences, in order
    label_positions: Tensor  # (T,) int64, flat positions in (S · L) of the labels themselves
    cu_seqlens: Tensor  # (S + 1,) int64, sequence s owns labels[cu_seqlens[s]:cu_seqlens[s+1]]
    lengths: Tensor  # (S,) int64, completion tokens of each sequence
    cu_groups: Tensor  # (G + 1,) int64, offsets of the groups' responses
    targets: Tensor | None  # fp64: p of each pair (B,) or None; label or score of responses (S,)
    token_weights: Tensor | None  # (T,) fp32, how much each label counts; None: all alike
    responses: Tensor  # (S,) int64, position of each sequence among all responses of the data
    kind: Kind
    tokens: int  # unpadded tokens of all sequences

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
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


def collate(groups: Sequence[TokenGroup], kind: Kind = "pairwise") -> Batch:
    """Tensors of one forward pass over the groups."""
    members = [(group, k) for group in groups for k in range(len(group.responses))]
    if kind == "pairwise":
        members.sort(key=lambda member: member[1])  # stable: all chosen, then all rejected
    sequences = [(group.prompt, group.responses[k]) for group, k in members]
    weights = [group.token_weights[k] for group, k in members if group.token_weights is not None]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    own = []
    for s, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[s, :end] = np.concatenate([prompt, response])
        first = s * width + len(prompt)
        own.append(np.arange(first, first + len(response)))
    targets = [label for group in groups for label in group.labels or ()]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(np.concatenate(own) - 1),
        labels=torch.from_numpy(np.concatenate([r for _, r in sequences]).astype(np.int64)),
        label_positions=torch.from_numpy(np.concatenate(own)),
        cu_seqlens=_offsets([len(response) for _, response in sequences]),
        lengths=torch.tensor([len(response) for _, response in sequences]),
        cu_groups=_offsets([len(group.responses) for group in groups]),
        targets=torch.tensor(targets, dtype=torch.float64) if targets else None,
        token_weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        responses=torch.tensor([group.first + k for group, k in members]),
        kind=kind,
        tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
    )


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def micro_batch(groups: Groups, indices: Indices, device: torch.device) -> list[Batch]:
    """The forward passes of one micro-batch.

    On CUDA one pass over all groups. On CPU one pass for each group: no padding between groups,
    and a group's log-probs do not depend, to the last bit, on the groups that it happens to meet.
    """
    parts = [[index] for index in indices] if device.type == "cpu" else [indices]
    return [collate([groups[i] for i in part], groups.kind).to(device) for part in parts]


def join(views: Sequence[Any]) -> Logps:
    """The log-probs of all forward passes of a micro-batch, views of one kind, as one."""
    joined: Logps = type(views[0]).cat(views)
    return joined
