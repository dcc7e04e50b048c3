"""Segments of a packed row: prompts and their responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of a row of P tokens: the prompt of each group, followed by its responses.

    A token of a prompt sees the prompt up to itself; a token of a response sees the prompt of its
    group and its response up to itself. A sequence alone is a group without responses.

    groups: number of tokens of each group's prompt and of its responses, each at least 1.
    cache: tensors derived from the segments, such as masks; shared by all layers.
    """

    groups: tuple[tuple[int, ...], ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.groups or any(not parts or min(parts) < 1 for parts in self.groups):
            raise ValueError(
                "groups: expected the tokens of a prompt and of its responses, each at least 1, "
                f"for one group or more, got {self.groups}; remove empty prompts and responses"
            )

    @cached_property
    def sizes(self) -> Counts:
        """(N,) number of tokens of each segment of the row, prompt or response, in order."""
        return np.concatenate(self.groups)

    @cached_property
    def prompts(self) -> Counts:
        """(N,) index of the segment that is the prompt of each segment; a prompt has its own."""
        segments = np.array([len(group) for group in self.groups])
        return (segments.cumsum() - segments).repeat(segments)

    @cached_property
    def starts(self) -> Counts:
        """(N,) first position of each segment in the row."""
        return self.sizes.cumsum() - self.sizes

    @cached_property
    def positions(self) -> Counts:
        """(P,) position of each token in its own sequence, from 0."""
        is_prompt = self.prompts == np.arange(len(self.sizes))
        prompt_lengths = np.where(is_prompt, 0, self.sizes[self.prompts])
        return np.arange(self.sizes.sum()) + (prompt_lengths - self.starts).repeat(self.sizes)

    @cached_property
    def tokens(self) -> int:
        """P, the number of tokens of the row."""
        return int(self.sizes.sum())


def rows(count: int, length: int) -> Segments:
    """Segments of a padded batch, flattened: `count` sequences of `length` tokens each."""
    return Segments(((length,),) * count)
