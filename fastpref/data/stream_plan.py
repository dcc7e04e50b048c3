"""Steps over groups whose lengths are known a window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from fastpref.data.batch_plan import Indices, Layout, Plan, tokens_of
from fastpref.data.dataset import UNITS, Groups, Lengths, TokenGroup
from fastpref.data.readers import DataError
from fastpref.data.streaming import StreamedGroups


class StreamedLengths:
    """Tokens of the groups of the windows in memory, by index.

    layout: as in `tokens_of`; None counts a padded row of each group, its prompt and longest
        response.
    """

    def __init__(self, groups: StreamedGroups, layout: Layout | None) -> None:
        self._groups, self._layout = groups, layout

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        """Tokens of one group, or of several as an array."""
        if isinstance(index, Sequence):
            return np.array([self[k] for k in index])
        return tokens(self._groups.find(index), self._layout)


class _Responses:
    """Number of responses of the groups of the windows in memory, by index."""

    def __init__(self, groups: StreamedGroups) -> None:
        self._groups = groups

    def __getitem__(self, index: int) -> int:
        return len(self._groups.find(index).responses)


@dataclass(frozen=True)
class StreamedPlan(Plan):
    """Plan of streamed groups; `costs` and `rows` have those of the windows in memory."""

    groups_of: StreamedGroups = field(kw_only=True)
    longest: int = field(kw_only=True)  # tokens of the longest group that is possible

    def __post_init__(self) -> None:
        if self.longest > self.max_tokens:
            raise DataError(
                f"training.micro_batch_tokens: {self.max_tokens:,} cannot hold the longest "
                f"{self.unit} that data.max_length allows ({self.longest:,} tokens); raise it, or "
                "lower data.max_length"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.costs) // self.batch_size)

    @property
    def shortest(self) -> int:
        return self.groups_of.shortest.index

    def groups(self, number: int) -> Indices:
        epoch, position = divmod(number, self.steps_per_epoch)
        per_window = self.groups_of.window_rows * self.groups_of.per_row // self.batch_size
        window, step = divmod(position, per_window)
        order = self.groups_of.window(epoch, window).order
        return [int(index) for index in order[step * self.batch_size :][: self.batch_size]]

    def step(self, number: int) -> list[Indices]:
        indices = self.groups(number)
        for index in indices:
            size = int(self.costs[index]) * (1 if self.rows is None else int(self.rows[index]))
            if size > self.max_tokens:
                (row,) = self.groups_of.row_names([index])
                raise DataError(
                    f"{self.groups_of.source}, row {row}: a {self.unit} of {size:,} tokens is more "
                    f"than a micro-batch holds, {self.max_tokens:,}; raise "
                    "training.micro_batch_tokens"
                )
        return self.parts(indices)


def plan_stream(
    groups: StreamedGroups,
    batch_size: int,
    max_tokens: int,
    seed: int,
    layout: Layout,
    ranks: int = 1,
    rank: int = 0,
) -> StreamedPlan:
    """Plan of streamed groups; DataError if a micro-batch cannot hold the longest possible one."""
    padded = layout == "padded"
    costs: Any = StreamedLengths(groups, None if padded else layout)
    rows: Any = _Responses(groups) if padded else None
    return StreamedPlan(
        costs,
        rows,
        batch_size,
        max_tokens,
        seed,
        UNITS[groups.kind],
        ranks,
        rank,
        groups_of=groups,
        longest=int(tokens_of(longest_possible(groups), layout).max()),
    )


def tokens(group: TokenGroup, layout: Layout | None) -> int:
    """Tokens of a group in a layout; without one, of a padded row of it."""
    lengths = [len(response) for response in group.responses]
    longest = len(group.prompt) + max(lengths)
    if layout is None:
        return longest
    if layout == "padded":
        return longest * len(lengths)
    copies = len(lengths) if layout == "packed" else 1
    return copies * len(group.prompt) + sum(lengths)


class _Longest:
    """Lengths of one group as long as `max_length` allows, as a data set."""

    def __init__(self, groups: StreamedGroups) -> None:
        self.kind = groups.kind
        count = int(np.diff(groups.sample.offsets).max())
        limit = groups.max_length
        self.prompt_lengths: Lengths = np.array([1])
        self.response_lengths: Lengths = np.full(count, limit - 1)
        self.padded_lengths: Lengths = np.array([limit])
        self.offsets: Lengths = np.array([0, count])


def longest_possible(groups: StreamedGroups) -> Groups:
    """Lengths of a group as long as `data.max_length` allows, with as many responses as any of the
    first window has.
    """
    return cast(Groups, _Longest(groups))
