"""Deterministic assignment of groups to optimizer steps and micro-batches.

The groups of step k depend only on (data, batch_size, seed, k), so resuming needs nothing but k,
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fastpref.data.dataset import UNITS, Groups, Lengths
from fastpref.data.mixture import Mixture
from fastpref.data.readers import DataError

Indices = list[int]
# Layout of the groups of a forward pass: one row with each prompt once (prefix_shared), one row
# with a copy of the prompt for each response (packed), or one padded row per response (padded).
Layout = Literal["prefix_shared", "packed", "padded"]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of `batch_size` groups, each split into micro-batches of `max_tokens`.

    costs: (N,) tokens of each group in a packed row; for padded rows, tokens of one row of the
        group (prompt and longest response).
    rows: (N,) number of padded rows of each group, or None for packed rows.
    seed: shuffles the groups, differently in each epoch; None keeps the order of the data.
    unit: name of a group in messages.
    ranks: number of processes that share a step; `step` returns the micro-batches of `rank`.
    mixture: sources of the groups, whose parts of an epoch it decides where there is a seed.
    first_step: number of the first step, for data that a run takes up later.
    """

    costs: Lengths
    rows: Lengths | None
    batch_size: int
    max_tokens: int
    seed: int | None = None
    unit: str = "pair"
    ranks: int = 1
    rank: int = 0
    mixture: Mixture | None = None
    first_step: int = 0

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
        mixture = getattr(groups, "mixture", None) if seed is not None else None
        unit = UNITS[groups.kind]
        return cls(costs, rows, batch_size, max_tokens, seed, unit, ranks, rank, mixture)

    @property
    def steps_per_epoch(self) -> int:
        length = len(self.costs if self.mixture is None else self.mixture)
        return -(-length // self.batch_size)

    @property
    def shortest(self) -> int:
        """Index of the cheapest group, which stands in on a rank that has run out of groups."""
        return int(self.costs.argmin())

    def groups(self, number: int) -> Indices:
        """All groups of optimizer step `number`, counted over all epochs from `first_step`."""
        epoch, position = divmod(number - self.first_step, self.steps_per_epoch)
        indices = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        return [int(index) for index in indices]

    def step(self, number: int) -> list[Indices]:
        """Micro-batches of this rank in a step; every rank has the same number, some are empty."""
        return self.parts(self.groups(number))

    def parts(self, indices: Indices) -> list[Indices]:
        """Micro-batches of this rank, out of groups that are split over all ranks."""
        if self.ranks == 1:
            return self.pack(indices)
        return self.spread(indices)[self.rank :: self.ranks]

    def epoch(self, number: int = 0) -> Iterator[list[Indices]]:
        """All steps of one epoch; without a mixture every group occurs exactly once."""
        first = self.first_step + number * self.steps_per_epoch
        return (self.step(first + k) for k in range(self.steps_per_epoch))

    def coverage(self) -> Iterator[Indices]:
        """Groups of the steps of the first epoch, then in steps those that it leaves out."""
        left_out = np.ones(len(self.costs), dtype=np.bool_)
        for number in range(self.steps_per_epoch):
            indices = self.groups(self.first_step + number)
            left_out[indices] = False
            yield indices
        others = [int(index) for index in left_out.nonzero()[0]]
        for start in range(0, len(others), self.batch_size):
            yield others[start : start + self.batch_size]

    def pack(self, indices: Iterable[int]) -> list[Indices]:
        """First-fit decreasing: each group, longest first, goes into the first bin with room."""
        bins: list[_Bin] = []
        for index in self._longest_first(indices):
            size = self._size(index)
            target = next((candidate for candidate in bins if size <= candidate.room), None)
            if target is None:
                target = self._bin_for(index)
                bins.append(target)
            target.add(index, size, self._load(index))
        return [filled.indices for filled in bins]

    def spread(self, indices: Indices) -> list[Indices]:
        """Micro-batches of all ranks, heaviest first; their number is a multiple of `ranks`.

        Each group, longest first, goes into the bin with the smallest load, so that ranks have
        similar work.
        """
        count = -(-len(self.pack(indices)) // self.ranks) * self.ranks
        while (bins := self._balanced(indices, count)) is None:
            count += self.ranks
        return bins

    def _balanced(self, indices: Indices, count: int) -> list[Indices] | None:
        """Groups spread evenly over `count` bins, or None if the bins have no room for a group."""
        bins: list[_Bin] = []
        for index in self._longest_first(indices):
            size = self._size(index)
            if len(bins) < count:
                bins.append(self._bin_for(index))
            fitting = bins[-1:] if not bins[-1].indices else [b for b in bins if size <= b.room]
            if not fitting:
                return None
            min(fitting, key=lambda b: b.load).add(index, size, self._load(index))
        bins.sort(key=lambda b: -b.load)
        return [b.indices for b in bins] + [[] for _ in range(count - len(bins))]

    def _longest_first(self, indices: Iterable[int]) -> Indices:
        return sorted(indices, key=lambda i: (-self.costs[i], i))

    def _size(self, index: int) -> int:
        """Room that a group takes in a micro-batch: tokens, or rows if rows are padded."""
        return int(self.costs[index] if self.rows is None else self.rows[index])

    def _load(self, index: int) -> int:
        return int(self.costs[index] * (1 if self.rows is None else self.rows[index]))

    def _bin_for(self, index: int) -> _Bin:
        """Empty bin whose first, and therefore longest, group will be `index`."""
        return _Bin(self.max_tokens // (1 if self.rows is None else int(self.costs[index])))

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.seed is None:
            return np.arange(len(self.costs))
        if self.mixture is not None:
            return self.mixture.order(self.seed, epoch)
        return _permutation(self.seed, epoch, len(self.costs))


# Cached because every step of an epoch reads it.
@lru_cache(maxsize=1)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)


class _Bin:
    """A micro-batch that is being filled."""

    def __init__(self, room: int) -> None:
        self.indices: Indices = []
        self.room, self.load = room, 0

    def add(self, index: int, size: int, load: int) -> None:
        self.indices.append(index)
        self.room -= size
        self.load += load


def tokens_of(groups: Groups, layout: Layout) -> Lengths:
    """Tokens of each group in a layout, (N,), including its own padding in padded rows."""
    responses = np.diff(groups.offsets)
    if layout == "padded":
        return groups.padded_lengths * responses
    prompts = groups.prompt_lengths * (responses if layout == "packed" else 1)
    return prompts + np.add.reduceat(groups.response_lengths, groups.offsets[:-1])
