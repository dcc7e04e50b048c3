"""The deterministic plan of which groups meet in which optimizer step and micro-batch.

Step k is a function of (data, batch_size, seed, k) alone: resuming needs no more than k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastpref.data.formats import DataError
from fastpref.data.tokens import UNITS, Groups, Lengths

Indices = list[int]
# How groups lie in a forward pass: in one row, each prompt once (shared) or for each of its
# responses again (flat), or as one row for each response (padded).
Layout = Literal["shared", "flat", "padded"]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of `batch_size` groups, each split into micro-batches of `max_tokens`.

    costs: (N,) tokens that a group takes in a packed row; in padded rows those of one of its
        responses, padded to the longest.
    rows: (N,) how many such it has, or None where groups are packed.
    seed: of the order, anew in each epoch; None is the order of the data.
    unit: what a group is called in messages.
    """

    costs: Lengths
    rows: Lengths | None
    batch_size: int
    max_tokens: int
    seed: int | None = None
    unit: str = "pair"

    def __post_init__(self) -> None:
        largest = int((self.costs if self.rows is None else self.costs * self.rows).max())
        if largest > self.max_tokens:
            raise DataError(
                f"training.max_tokens: {self.max_tokens:,} cannot hold the longest {self.unit} "
                f"({largest:,} tokens); raise it, or lower data.max_length"
            )

    @classmethod
    def of(
        cls,
        groups: Groups,
        batch_size: int,
        max_tokens: int,
        seed: int | None = None,
        layout: Layout = "padded",
    ) -> Plan:
        costs, rows = tokens_of(groups, layout), None
        if layout == "padded":
            costs, rows = groups.padded_lengths, np.diff(groups.offsets)
        return cls(costs, rows, batch_size, max_tokens, seed, UNITS[groups.kind])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.costs) // self.batch_size)

    def step(self, number: int) -> list[Indices]:
        """Micro-batches of the optimizer step `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        chosen = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        return self.pack(map(int, chosen))

    def epoch(self, number: int = 0) -> Iterator[list[Indices]]:
        """All steps of one epoch; every group comes exactly once."""
        first = number * self.steps_per_epoch
        return (self.step(first + k) for k in range(self.steps_per_epoch))

    def pack(self, indices: Iterable[int]) -> list[Indices]:
        """Micro-batches within the budget: each group, longest first, into the first with room."""
        micro_batches: list[Indices] = []
        room: list[int] = []  # tokens, or rows of padded ones, whose first group is the longest
        for index in sorted(indices, key=lambda i: (-self.costs[i], i)):
            size = int(self.costs[index] if self.rows is None else self.rows[index])
            fitting = (k for k, left in enumerate(room) if size <= left)
            k = next(fitting, len(room))
            if k == len(room):
                micro_batches.append([])
                width = 1 if self.rows is None else int(self.costs[index])
                room.append(self.max_tokens // width)
            micro_batches[k].append(index)
            room[k] -= size
        return micro_batches

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.seed is None:
            return np.arange(len(self.costs))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.costs))


def tokens_of(groups: Groups, layout: Layout) -> Lengths:
    """Tokens that each group takes in a layout, with padding if it is alone in its rows, (N,)."""
    responses = np.diff(groups.offsets)
    if layout == "padded":
        return groups.padded_lengths * responses
    prompts = groups.prompt_lengths * (responses if layout == "flat" else 1)
    return prompts + np.add.reduceat(groups.response_lengths, groups.offsets[:-1])
