"""Contents of batches, and log-probs as inputs of objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.data.collate import Batch, collate, join
from fastpref.data.dataset import TokenGroup
from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps


def pair(prompt: list[int], chosen: list[int], rejected: list[int], index: int = 0) -> TokenGroup:
    ids = (np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected))
    prompt, *both = ids
    return TokenGroup(index, index + 1, prompt, tuple(both), first=2 * index)


def test_collate() -> None:
    batch = collate([pair([1, 2], [3], [4, 5], index=9), pair([6], [7, 8, 9], [10], index=4)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [6, 7, 8, 9], [1, 2, 4, 5], [6, 10, 0, 0]]
    assert batch.labels.tolist() == [3, 7, 8, 9, 4, 5, 10]
    assert batch.cu_seqlens.tolist() == [0, 1, 4, 6, 7]
    assert batch.lengths.tolist() == [1, 3, 2, 1]
    assert batch.responses.tolist() == [18, 8, 19, 9]
    assert batch.cu_groups.tolist() == [0, 2, 4] and batch.targets is None
    assert batch.tokens == 3 + 4 + 4 + 2
    # The token after each position is the label that its hidden state predicts.
    following = batch.input_ids.flatten()[batch.predictor_positions + 1]
    assert torch.equal(following, batch.labels)


def group(sizes: list[int], labels: list[float] | None, first: int = 0) -> TokenGroup:
    """A prompt of two tokens and responses of `sizes` tokens."""
    responses = tuple(np.full(size, 5 + size, dtype=np.int32) for size in sizes)
    prompt = np.array([1, 2], dtype=np.int32)
    return TokenGroup(
        0, 1, prompt, responses, None if labels is None else tuple(labels), first=first
    )


def test_collate_keeps_the_responses_of_a_group_together() -> None:
    parts = [group([1, 3], [0.5, 2.0], first=7), group([2], [1.0], first=3)]
    batch = collate(parts, "groupwise")
    assert batch.lengths.tolist() == [1, 3, 2]
    assert batch.labels.tolist() == [6, 8, 8, 8, 7, 7]
    assert (batch.cu_groups.tolist(), batch.responses.tolist()) == ([0, 2, 3], [7, 8, 3])
    assert torch.equal(batch.input_ids.flatten()[batch.predictor_positions + 1], batch.labels)


def test_views_are_what_objectives_take() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    soft = collate([group([1, 1], [0.7]), group([1, 2], [0.2])]).view(logps)
    assert isinstance(soft, SequenceLogps) and soft.preference is not None
    assert (soft.rejected.tolist(), soft.preference.tolist()) == ([-3.0, -4.0], [0.7, 0.2])
    hard = collate([group([1, 1], None)]).view(logps[:2])
    assert isinstance(hard, SequenceLogps) and hard.preference is None
    single = collate([group([1], [1.0]), group([2], [0.0])], "pointwise").view(logps[:2])
    assert isinstance(single, UnpairedLogps) and single.desirable.tolist() == [True, False]
    weighted = replace(group([1, 1], [0.7]), token_weights=(np.float32([2]), np.float32([0.5])))
    tokens = collate([weighted]).token_view(logps[:2], kl=logps[2:])
    assert tokens.weights is not None and tokens.weights.tolist() == [2.0, 0.5]
    assert tokens.kl is not None and tokens.cu_seqlens.tolist() == [0, 1, 2]
    scored = collate([group([1, 1, 4], [3, 1, 2])], "groupwise").view(logps[:3])
    assert isinstance(scored, GroupedLogps) and scored.scores.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("kind", "labels"), [("pairwise", [0.7]), ("pointwise", [1.0]), ("groupwise", [3.0, 1.0, 2.0])]
)
def test_joined_passes_equal_one(kind: Any, labels: list[float]) -> None:
    count = {"pairwise": 2, "pointwise": 1, "groupwise": 3}[kind]
    parts = [group(list(range(1 + k, 1 + k + count)), labels) for k in range(3)]
    batches = [collate([part], kind) for part in parts]
    logps = [torch.randn(count) for _ in parts]
    whole: Batch = collate(parts, kind)
    order = torch.stack(logps).T.flatten() if kind == "pairwise" else torch.cat(logps)
    joined = join([batch.view(part) for batch, part in zip(batches, logps, strict=True)])
    expected, actual = vars(whole.view(order)), vars(joined)
    absent = {name for name, value in expected.items() if value is None}
    assert absent == {name for name, value in actual.items() if value is None}
    assert all(torch.equal(actual[name], expected[name]) for name in expected.keys() - absent)
