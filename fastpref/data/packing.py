"""Groups in one row, [prompt | response_1 | … | response_K], the prompt of each computed once.

A response sees its prompt and itself, and its positions continue from the prompt's. The last token
of the prompt predicts the first of every response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.data.dataset import Lengths, TokenGroup


@dataclass(frozen=True, eq=False)
class Packing:
    """What a row of P tokens is made of: groups, one after the other, of a prompt and responses."""

    groups: tuple[tuple[int, ...], ...]  # tokens of each group's prompt, then of its responses
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)  # of this row, for all layers

    def __post_init__(self) -> None:
        if not self.groups or any(not parts or min(parts) < 1 for parts in self.groups):
            raise ValueError(
                "groups: expected the tokens of a prompt and of its responses, each at least 1, "
                f"for one group or more, got {self.groups}; leave out what is empty"
            )

    @cached_property
    def sizes(self) -> Lengths:
        """(N,) tokens of all parts of the row, prompts and responses, in order."""
        return np.concatenate(self.groups)

    @cached_property
    def prompts(self) -> Lengths:
        """(N,) which part is the prompt of a part; a prompt is its own."""
        parts = np.array([len(group) for group in self.groups])
        return (parts.cumsum() - parts).repeat(parts)

    @property
    def starts(self) -> Lengths:
        """(N,) where in the row a part starts."""
        return self.sizes.cumsum() - self.sizes

    @property
    def positions(self) -> Lengths:
        """(P,) position of each token in its own sequence, from 0."""
        is_prompt = self.prompts == np.arange(len(self.sizes))
        before = np.where(is_prompt, 0, self.sizes[self.prompts])
        return np.arange(self.sizes.sum()) + (before - self.starts).repeat(self.sizes)

    def varlen_arguments(self, device: torch.device) -> dict[str, Any]:
        """What transformers' "flash_attention_2" takes in place of a mask, where nothing is shared.

        Raises ValueError if a prompt has several responses: that kernel cannot share it.
        """
        responses = max(map(len, self.groups)) - 1
        if responses > 1:
            raise ValueError(
                f"groups: expected one response for each prompt, got {responses}; varlen attention "
                "cannot share a prompt, lay the groups out with share=False"
            )
        lengths = [sum(group) for group in self.groups]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


class Row(NamedTuple):
    """The packed tokens of one forward pass."""

    input_ids: Tensor  # (1, P) int64
    position_ids: Tensor  # (1, P) int64
    positions: Tensor  # (T,) int64, positions in the row whose hidden state predicts a label
    label_positions: Tensor  # (T,) int64, positions in the row of the labels themselves
    packing: Packing


def lay_out(
    groups: Sequence[TokenGroup], members: Sequence[tuple[int, int]], share: bool = True
) -> Row:
    """One row of all groups, and where in it the labels of the members are, in their order.

    A member is a sequence: which group it is of, and which of the group's responses it ends with.
    Without `share` each brings a copy of its prompt, and the row is the members in their order.
    """
    if share:
        parts = [[group.prompt, *group.responses] for group in groups]
    else:
        parts = [[groups[g].prompt, groups[g].responses[k]] for g, k in members]
        members = [(s, 0) for s in range(len(parts))]
    packing = Packing(tuple(tuple(map(len, group)) for group in parts))
    starts, first_responses = packing.starts, np.unique(packing.prompts) + 1
    positions, label_positions = [], []
    for g, k in members:
        first = first_responses[g]
        own = starts[first + k] + np.arange(packing.sizes[first + k])
        label_positions.append(own)
        positions.append(np.concatenate([starts[first, None], own[1:]]) - 1)
    ids = np.concatenate([ids for group in parts for ids in group]).astype(np.int64)
    return Row(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(packing.positions)[None],
        positions=torch.from_numpy(np.concatenate(positions)),
        label_positions=torch.from_numpy(np.concatenate(label_positions)),
        packing=packing,
    )
