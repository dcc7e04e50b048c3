"""The deterministic plan of which groups meet in which optimizer step and micro-batch.

The groups of step k are a function of (data, batch_size, seed, k) alone: resuming needs no more
than k, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fastpref.data.dataset import UNITS, Groups, Lengths
from fastpref.data.readers import DataError

Indices = list[int]
# How groups lie in a forward pass: in one row, each prompt once (shared) or for each of its
# responses again (packed), or as one row for each response (padded).
Layout = Literal["prefix_shared", "packed", "padded"]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of `batch_size` groups, each split into micro-batches of `max_tokens`.

    costs: (N,) tokens that a group takes in a packed row; in padded rows those of one of its
        responses, padded to the longest.
    rows: (N,) how many such it has, or None where groups are packed.
    seed: of the order, anew in each epoch; None is the order of the data.
    unit: what a group is called in messages.
    ranks: processes that share a step; `step` gives the micro-batches of `rank`.
    """

    costs: Lengths
    rows: Lengths | None
    batch_size: int
    max_tokens: int
    seed: int | None = None
    unit: str = "pair"
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        largest = int((self.costs if self.rows is None else self.costs * self.rows).max())
        if largest > self.max_tokens:
            raise DataError(
                f"training.micro_batch_tokens: {self.max_tokens:,} cannot hold the longest "
                f"{self.unit} ({largest:,} tokens); raise it, or lower data.max_length"
            )

    @classmethod
    def of(
        cls,
        groups: Groups,
        batch_size: int,
        max_tokens: int,
        seed: int | None = None,
        layout: Layout = "padded",
        ranks: int = 1,
        rank: int = 0,
    ) -> Plan:
        costs, rows = tokens_of(groups, layout), None
        if layout == "padded":
            costs, rows = groups.padded_lengths, np.diff(groups.offsets)
        return cls(costs, rows, batch_size, max_tokens, seed, UNITS[groups.kind], ranks, rank)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.costs) // self.batch_size)

    @property
    def shortest(self) -> int:
        """A group for a rank that has none, where the others have."""
        return int(self.costs.argmin())

    def groups(self, number: int) -> Indices:
        """All groups of the optimizer step `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        chosen = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        return [int(index) for index in chosen]

    def step(self, number: int) -> list[Indices]:
        """Micro-batches of this rank in a step; all ranks have as many, some of them empty."""
        return self.parts(self.groups(number))

    def parts(self, indices: Indices) -> list[Indices]:
        """Micro-batches of this rank, of groups that all ranks share."""
        if self.ranks == 1:
            return self.pack(indices)
        return self.spread(indices)[self.rank :: self.ranks]

    def epoch(self, number: int = 0) -> Iterator[list[Indices]]:
        """All steps of one epoch; every group comes exactly once."""
        first = number * self.steps_per_epoch
        return (self.step(first + k) for k in range(self.steps_per_epoch))

    def pack(self, indices: Iterable[int]) -> list[Indices]:
        """Micro-batches within the budget: each group, longest first, into the first with room."""
        bins: list[_Bin] = []
        for index in self._longest_first(indices):
            size = self._size(index)
            found = next((each for each in bins if size <= each.room), None)
            if found is None:
                bins.append(found := self._bin_for(index))
            found.take(index, size, self._load(index))
        return [each.indices for each in bins]

    def spread(self, indices: Indices) -> list[Indices]:
        """Micro-batches within the budget for all ranks: a multiple of their number, as even as
        longest first into the emptiest makes them, the heaviest first."""
        count = -(-len(self.pack(indices)) // self.ranks) * self.ranks
        while (bins := self._even(indices, count)) is None:
            count += self.ranks
        return bins

    def _even(self, indices: Indices, count: int) -> list[Indices] | None:
        bins: list[_Bin] = []
        for index in self._longest_first(indices):
            size = self._size(index)
            if len(bins) < count:
                bins.append(self._bin_for(index))
            fitting = bins[-1:] if not bins[-1].indices else [b for b in bins if size <= b.room]
            if not fitting:
                return None
            min(fitting, key=lambda each: each.load).take(index, size, self._load(index))
        bins.sort(key=lambda each: -each.load)
        return [each.indices for each in bins] + [[] for _ in range(count - len(bins))]

    def _longest_first(self, indices: Iterable[int]) -> Indices:
        return sorted(indices, key=lambda i: (-self.costs[i], i))

    def _size(self, index: int) -> int:
        """What a group takes of a micro-batch's room: tokens, or rows of padded ones."""
        return int(self.costs[index] if self.rows is None else self.rows[index])

    def _load(self, index: int) -> int:
        return int(self.costs[index] * (1 if self.rows is None else self.rows[index]))

    def _bin_for(self, index: int) -> _Bin:
        """An empty micro-batch whose first group, and so its longest, is to be this one."""
        return _Bin(self.max_tokens // (1 if self.rows is None else int(self.costs[index])))

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.seed is None:
            return np.arange(len(self.costs))
        return _permutation(self.seed, epoch, len(self.costs))


@lru_cache(maxsize=1)  # all steps of an epoch ask for it
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)


class _Bin:
    """A micro-batch while it is filled."""

    def __init__(self, room: int) -> None:
        self.indices: Indices = []
        self.room, self.load = room, 0

    def take(self, index: int, size: int, load: int) -> None:
        self.indices.append(index)
        self.room -= size
        self.load += load


def tokens_of(groups: Groups, layout: Layout) -> Lengths:
    """Tokens that each group takes in a layout, with padding if it is alone in its rows, (N,)."""
    responses = np.diff(groups.offsets)
    if layout == "padded":
        return groups.padded_lengths * responses
    prompts = groups.prompt_lengths * (responses if layout == "packed" else 1)
    return prompts + np.add.reduceat(groups.response_lengths, groups.offsets[:-1])
