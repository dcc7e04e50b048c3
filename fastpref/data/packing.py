"""Pack groups into one row, [prompt | response_1 | … | response_K]; each prompt is computed once.

A response attends to its prompt and to itself, and its position ids continue from the prompt's.
The last token of the prompt predicts the first token of every response.
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
    """Segments of a packed row of P tokens: the prompt of each group, followed by its responses.

    groups: number of tokens of each group's prompt and of its responses.
    masks: cache of the row's attention masks, shared by all layers.
    """

    groups: tuple[tuple[int, ...], ...]
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.groups or any(not parts or min(parts) < 1 for parts in self.groups):
            raise ValueError(
                "groups: expected the tokens of a prompt and of its responses, each at least 1, "
                f"for one group or more, got {self.groups}; remove empty prompts and responses"
            )

    @cached_property
    def sizes(self) -> Lengths:
        """(N,) number of tokens of each segment of the row, prompt or response, in order."""
        return np.concatenate(self.groups)

    @cached_property
    def prompts(self) -> Lengths:
        """(N,) index of the segment that is the prompt of each segment; a prompt has its own."""
        segments = np.array([len(group) for group in self.groups])
        return (segments.cumsum() - segments).repeat(segments)

    @property
    def starts(self) -> Lengths:
        """(N,) first position of each segment in the row."""
        return self.sizes.cumsum() - self.sizes

    @property
    def positions(self) -> Lengths:
        """(P,) position of each token in its own sequence, from 0."""
        is_prompt = self.prompts == np.arange(len(self.sizes))
        prompt_lengths = np.where(is_prompt, 0, self.sizes[self.prompts])
        return np.arange(self.sizes.sum()) + (prompt_lengths - self.starts).repeat(self.sizes)

    def varlen_arguments(self, device: torch.device) -> dict[str, Any]:
        """Arguments of transformers' "flash_attention_2" that replace the mask of a packed row.

        Raises ValueError if a prompt has several responses: the kernel cannot share a prompt.
        """
        responses = max(map(len, self.groups)) - 1
        if responses > 1:
            raise ValueError(
                f"groups: expected one response for each prompt, got {responses}; varlen attention "
                "cannot share a prompt, so pack the groups with share=False"
            )
        lengths = [sum(group) for group in self.groups]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


class PackedRow(NamedTuple):
    """Packed tokens of one forward pass."""

    input_ids: Tensor  # (1, P) int64
    position_ids: Tensor  # (1, P) int64
    predictor_positions: Tensor  # (T,) int64, positions in the row that predict the labels
    label_positions: Tensor  # (T,) int64, positions in the row of the labels themselves
    packing: Packing


def pack_groups(
    groups: Sequence[TokenGroup], sequences: Sequence[tuple[int, int]], share: bool = True
) -> PackedRow:
    """Pack groups into one row; labels are those of `sequences`, in their order.

    sequences: (group, response) index pairs, each a prompt followed by one of its responses.
    share: store each prompt once; otherwise the row is the sequences in order, each with a copy
        of its prompt.
    """
    if share:
        segments = [[group.prompt, *group.responses] for group in groups]
    else:
        segments = [[groups[g].prompt, groups[g].responses[k]] for g, k in sequences]
        sequences = [(s, 0) for s in range(len(segments))]
    packing = Packing(tuple(tuple(map(len, group)) for group in segments))
    starts, first_responses = packing.starts, np.unique(packing.prompts) + 1
    predictor_positions, label_positions = [], []
    for g, k in sequences:
        first = first_responses[g]
        labels = starts[first + k] + np.arange(packing.sizes[first + k])
        label_positions.append(labels)
        predictor_positions.append(np.concatenate([starts[first, None], labels[1:]]) - 1)
    ids = np.concatenate([ids for group in segments for ids in group]).astype(np.int64)
    return PackedRow(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(packing.positions)[None],
        predictor_positions=torch.from_numpy(np.concatenate(predictor_positions)),
        label_positions=torch.from_numpy(np.concatenate(label_positions)),
        packing=packing,
    )
