"""Packed rows: tokens, position ids, and the positions of labels and predictors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpref.attention import Segments
from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup
from fastpref.data.packing import pack_groups, varlen_arguments

CPU = torch.device("cpu")


def group(prompt: list[int], *responses: list[int]) -> TokenGroup:
    ids = [np.array(part, dtype=np.int32) for part in (prompt, *responses)]
    return TokenGroup(0, 1, ids[0], tuple(ids[1:]))


PAIRS = [group([1, 2], [3], [4, 5]), group([6], [7, 8, 9], [10])]
MEMBERS = [(0, 0), (1, 0), (0, 1), (1, 1)]  # all chosen, then all rejected


def test_a_row_of_pairs() -> None:
    row = pack_groups(PAIRS, MEMBERS)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert row.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 3, 1]]
    assert row.segments.groups == ((2, 1, 2), (1, 3, 1))
    assert row.label_positions.tolist() == [2, 6, 7, 8, 3, 4, 9]
    assert row.predictor_positions.tolist() == [1, 5, 6, 7, 1, 3, 5]


def test_without_sharing_every_member_has_its_own_prompt() -> None:
    row = pack_groups(PAIRS, MEMBERS, share=False)
    assert row.input_ids.tolist() == [[1, 2, 3, 6, 7, 8, 9, 1, 2, 4, 5, 6, 10]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    assert row.segments.groups == ((2, 1), (1, 3), (2, 2), (1, 1))
    assert row.label_positions.tolist() == [2, 4, 5, 6, 9, 10, 12]
    assert torch.equal(row.predictor_positions, row.label_positions - 1)
    arguments = varlen_arguments(row.segments, CPU)
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 7, 11, 13]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["cu_seq_lens_k"].tolist() == [0, 3, 7, 11, 13]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 4


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["pairwise", "groupwise"])
def test_labels_are_those_of_the_padded_batch(kind: str, share: bool) -> None:
    """Groups have several responses per prompt, or one."""
    rng = np.random.default_rng(0)
    sizes = [(3, 4, 1), (1, 1, 1), (5, 2, 7)] if kind == "pairwise" else [(2, 1, 3, 9, 4), (6, 5)]
    groups = [group(*(rng.integers(3, 99, size).tolist() for size in part)) for part in sizes]
    groups = [TokenGroup(g.index, g.row, g.prompt, g.responses, (1.0,)) for g in groups]
    members = [(g, k) for g, part in enumerate(sizes) for k in range(len(part) - 1)]
    if kind == "pairwise":
        members.sort(key=lambda member: member[1])
    row, batch = pack_groups(groups, members, share), collate(groups, kind)  # type: ignore[arg-type]
    assert torch.equal(row.input_ids[0, row.label_positions], batch.labels)
    ids = batch.input_ids.flatten()
    assert torch.equal(row.input_ids[0, row.predictor_positions], ids[batch.predictor_positions])
    where = batch.label_positions % batch.input_ids.shape[1]
    assert torch.equal(row.position_ids[0, row.label_positions], where)
    assert torch.equal(row.position_ids[0, row.predictor_positions], where - 1)


@pytest.mark.parametrize("groups", [(), ((),), ((3, 0),), ((2, 1), (0, 4))])
def test_an_empty_part_is_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="groups: expected the tokens of a prompt"):
        Segments(groups)


def test_varlen_attention_cannot_share_a_prompt() -> None:
    with pytest.raises(ValueError, match=r"one response for each prompt, got 2; .*share=False"):
        varlen_arguments(pack_groups(PAIRS, MEMBERS).segments, CPU)
