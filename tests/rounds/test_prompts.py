"""Prompts of a run and of its rounds."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.rounds.prompts import load_prompts, prompts_of_round
from fastpref.utils.errors import UserError
from tests.helpers.data import rows, write_jsonl


def test_rounds_take_every_prompt_once_in_each_pass() -> None:
    rounds = [prompts_of_round(10, number, 4, seed=3) for number in range(1, 6)]
    assert all(len(set(indices)) == 4 for indices in rounds)
    assert Counter(chain.from_iterable(rounds)) == dict.fromkeys(range(10), 2)
    assert rounds != [prompts_of_round(10, number, 4, seed=4) for number in range(1, 6)]


def test_a_round_of_all_prompts_has_them_in_order() -> None:
    assert prompts_of_round(5, 2, 5, seed=0) == [0, 1, 2, 3, 4]


def test_prompts_without_room_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(write_jsonl(tmp_path / "p.jsonl", [*rows(4), {"prompt": "tea " * 90}]))
    notes: list[str] = []
    prompts = load_prompts("data.train", path, tokenizer, 50, notes.append)
    assert len(prompts) == 4
    assert notes == [f"prompts: 4 different ones of {path}, 1 left out as too long"]
    with pytest.raises(UserError) as caught:
        load_prompts("data.train", path, tokenizer, 2, notes.append)
    assert str(caught.value) == (
        f"data.train: no prompt of {path} has at most 2 tokens, which leaves room for "
        "rounds.sampling.max_new_tokens in data.max_length; raise data.max_length"
    )
