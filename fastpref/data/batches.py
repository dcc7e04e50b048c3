"""The deterministic plan of which pairs meet in which step, and the tensors of one forward pass.

Step k is a function of (data, batch_size, seed, k) alone: resuming needs no more than k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.formats import DataError
from fastpref.data.tokens import PairDataset, TokenPair

Indices = list[int]
Lengths = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of `batch_size` pairs, each split into micro-batches of `max_tokens`."""

    lengths: Lengths  # (N,) tokens of each pair's longer side
    batch_size: int
    max_tokens: int
    seed: int | None  # None: in the order of the data

    def __post_init__(self) -> None:
        longest = int(np.argmax(self.lengths))
        cost = 2 * int(self.lengths[longest])
        if cost > self.max_tokens:
            raise DataError(
                f"training.max_tokens: {self.max_tokens:,} cannot hold the longest pair "
                f"({cost:,} padded tokens); raise it, or lower data.max_length"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def step(self, number: int) -> list[Indices]:
        """Micro-batches of the optimizer step `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        order = self._order(epoch)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        return pack(map(int, chosen), self.lengths, self.max_tokens)

    def epoch(self, number: int = 0) -> Iterator[list[Indices]]:
        """All steps of one epoch; every pair comes exactly once."""
        first = number * self.steps_per_epoch
        return (self.step(first + k) for k in range(self.steps_per_epoch))

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))


def pack(indices: Iterable[int], lengths: Lengths, max_tokens: int) -> list[Indices]:
    """Groups of pairs whose padded tokens fit the budget; a longer pair goes alone.

    Longest first, so that pairs of like length share a group and its padding.
    """
    groups: list[Indices] = []
    room = 0
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if room == 0:
            groups.append([])
            room = max(1, max_tokens // (2 * int(lengths[index])))
        groups[-1].append(index)
        room -= 1
    return groups


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B right-padded sequences: chosen_0 … chosen_{B-1}, rejected_0 … rejected_{B-1}.

    A causal model needs no mask for padding on the right: no token sees what follows it.
    """

    input_ids: Tensor  # (2B, L) int64
    positions: Tensor  # (T,) int64, flat positions in (2B · L) whose hidden state predicts a label
    labels: Tensor  # (T,) int64, the completion tokens of all sequences, in order
    cu_seqlens: Tensor  # (2B + 1,) int64, sequence s owns labels[cu_seqlens[s]:cu_seqlens[s+1]]
    lengths: Tensor  # (2B,) int64, completion tokens of each sequence
    preference: Tensor | None  # (B,) fp64, probability that chosen is preferred
    index: Tensor  # (B,) int64, position of each pair in the data set
    tokens: int  # unpadded tokens of all sequences

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **tensors})


def collate(pairs: Sequence[TokenPair]) -> Batch:
    """Tensors of one forward pass over the pairs."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    positions = []
    for s, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[s, :end] = np.concatenate([prompt, response])
        first = s * width + len(prompt) - 1
        positions.append(np.arange(first, first + len(response)))
    lengths = torch.tensor([len(response) for _, response in sequences])
    preference = [p.preference for p in pairs if p.preference is not None]  # of all or of none
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(np.concatenate([r for _, r in sequences]).astype(np.int64)),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        lengths=lengths,
        preference=torch.tensor(preference, dtype=torch.float64) if preference else None,
        index=torch.tensor([p.index for p in pairs]),
        tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
    )


def micro_batch(dataset: PairDataset, indices: Indices, device: torch.device) -> list[Batch]:
    """The forward passes of one micro-batch.

    On CUDA one pass over all pairs. On CPU one pass for each pair: no padding between pairs, and
    a pair's log-probs do not depend, to the last bit, on the pairs that it happens to meet.
    """
    groups = [[index] for index in indices] if device.type == "cpu" else [indices]
    return [collate([dataset[i] for i in group]).to(device) for group in groups]
