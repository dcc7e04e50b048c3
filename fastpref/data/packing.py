"""Pack groups into one row, [prompt | response_1 | … | response_K]; each prompt is computed once.

A response attends to its prompt and to itself, and its position ids continue from the prompt's.
The last token of the prompt predicts the first token of every response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.attention import Segments
from fastpref.data.dataset import TokenGroup


class PackedRow(NamedTuple):
    """Packed tokens of one forward pass."""

    input_ids: Tensor  # (1, P) int64
    position_ids: Tensor  # (1, P) int64
    predictor_positions: Tensor  # (T,) int64, positions in the row that predict the labels
    label_positions: Tensor  # (T,) int64, positions in the row of the labels themselves
    segments: Segments


def pack_groups(
    groups: Sequence[TokenGroup], sequences: Sequence[tuple[int, int]], share: bool = True
) -> PackedRow:
    """Pack groups into one row; labels are those of `sequences`, in their order.

    sequences: (group, response) index pairs, each a prompt followed by one of its responses.
    share: store each prompt once; otherwise the row is the sequences in order, each with a copy
        of its prompt.
    """
    if share:
        members = [[group.prompt, *group.responses] for group in groups]
    else:
        members = [[groups[g].prompt, groups[g].responses[k]] for g, k in sequences]
        sequences = [(s, 0) for s in range(len(members))]
    segments = Segments(tuple(tuple(map(len, group)) for group in members))
    starts, first_responses = segments.starts, np.unique(segments.prompts) + 1
    predictor_positions, label_positions = [], []
    for g, k in sequences:
        first = first_responses[g]
        labels = starts[first + k] + np.arange(segments.sizes[first + k])
        label_positions.append(labels)
        predictor_positions.append(np.concatenate([starts[first, None], labels[1:]]) - 1)
    ids = np.concatenate([ids for group in members for ids in group]).astype(np.int64)
    return PackedRow(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(segments.positions)[None],
        predictor_positions=torch.from_numpy(np.concatenate(predictor_positions)),
        label_positions=torch.from_numpy(np.concatenate(label_positions)),
        segments=segments,
    )


def varlen_arguments(segments: Segments, device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' "flash_attention_2" that replace the mask of a packed row.

    Raises ValueError if a prompt has several responses: the kernel cannot share a prompt.
    """
    responses = max(map(len, segments.groups)) - 1
    if responses > 1:
        raise ValueError(
            f"segments: expected one response for each prompt, got {responses}; varlen attention "
            "cannot share a prompt, so pack the groups with share=False"
        )
    lengths = [sum(group) for group in segments.groups]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
