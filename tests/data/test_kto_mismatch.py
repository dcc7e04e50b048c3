"""Responses to other prompts: assignment, truncation, and the error if there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.data.kto_mismatch import MismatchedGroups, partners
from fastpref.data.readers import DataError
from tests.helpers.data import labelled, write_jsonl


def load(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]]
) -> GroupDataset:
    path = write_jsonl(tmp_path / "d.jsonl", records)
    config = Data(train=str(path), cache=str(tmp_path / "cache"))
    return load_groups(str(path), tokenizer, config, "pointwise")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abcd", [1, 2, 3, 0]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),  # pairs, as two responses each
        ("aab", [2, 2, 0]),  # two steps after the second a is the first a
        ("abba", [2, 3, 0, 1]),  # the two a are adjacent, because the data wraps around
        ("aaa", []),
        ("a", []),
    ],
)
def test_the_rule(prompts: str, expected: list[int]) -> None:
    assert partners([prompt.encode() for prompt in prompts]).tolist() == expected


@given(st.text("abc", min_size=2, max_size=12).filter(lambda text: len(set(text)) > 1))
def test_every_prompt_takes_a_response_to_another(prompts: str) -> None:
    indices = partners([prompt.encode() for prompt in prompts])
    assert len(indices) == len(prompts)
    assert all(prompts[i] != prompts[partner] for i, partner in enumerate(indices))


def test_groups_are_the_prompt_and_the_response_that_it_takes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = load(tmp_path, tokenizer, labelled(5))
    mismatched = MismatchedGroups(dataset, max_length=2048)
    assert len(mismatched) == 5 and mismatched.offsets.tolist() == [0, 1, 2, 3, 4, 5]
    for i in range(5):
        group, matched, other = mismatched[i], dataset[i], dataset[(i + 1) % 5]
        assert group.prompt.tolist() == matched.prompt.tolist()
        assert group.responses[0].tolist() == other.responses[0].tolist()
        assert mismatched.padded_lengths[i] == len(matched.prompt) + len(other.responses[0])
        assert (group.index, group.first) == (i, i)


def test_the_response_is_cut_and_the_key_knows_where(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = load(tmp_path, tokenizer, labelled(5))
    longest = int(dataset.prompt_lengths.max())
    short, long = (MismatchedGroups(dataset, length) for length in (longest + 1, 2048))
    assert short.padded_lengths.max() == longest + 1
    for i in range(5):
        tokens = long[i].responses[0]
        room = longest + 1 - len(long[i].prompt)
        assert short[i].responses[0].tolist() == tokens[:room].tolist()
        assert len(short[i].prompt) + len(short[i].responses[0]) == short.padded_lengths[i]
    assert len({short.fingerprint, long.fingerprint, dataset.fingerprint}) == 3


def test_one_prompt_alone_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load(tmp_path, tokenizer, labelled(1) * 3)
    with pytest.raises(DataError, match=r"at least two prompts, .*\(use kto_simple or bco\)"):
        MismatchedGroups(dataset, 2048)
