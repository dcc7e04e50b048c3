"""Mismatched responses of a batch of pairs."""

from __future__ import annotations

import torch

from fastpref.fused.mismatched import Mismatched


def inputs(*pairs):
    """A right-padded batch: (prompt, chosen, rejected) as lists of token ids, none of them 0."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs]
    rows += [(prompt, rejected) for prompt, _, rejected in pairs]
    width = max(len(prompt + response) for prompt, response in rows)
    columns = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, response in rows:
        rest = [0] * (width - len(prompt + response))
        columns["input_ids"].append(prompt + response + rest)
        columns["attention_mask"].append([1] * len(prompt + response) + rest)
        columns["completion_mask"].append([0] * len(prompt) + [1] * len(response) + rest)
    return {name: torch.tensor(rows) for name, rows in columns.items()}


def sequences(batch):
    """Prompt and response of each sequence."""
    made = []
    for ids, mask, scored in zip(*(x.tolist() for x in batch.values()), strict=True):
        real = sum(mask)
        start = real - sum(scored)
        assert scored == [0] * start + [1] * (real - start) + [0] * (len(ids) - real)
        made.append((ids[:start], ids[start:real]))
    return made


A, B, C = ([1], [11, 12], [13]), ([2, 3], [21], [22, 23, 24]), ([4], [41], [])


def test_each_prompt_takes_both_responses_of_the_next_pair():
    made = sequences(Mismatched(None).batch(inputs(A, B, C)))
    assert made == [
        ([1], [21]), ([2, 3], [41]), ([4], [11, 12]),
        ([1], [22, 23, 24]), ([2, 3], []), ([4], [13]),
    ]  # fmt: skip


def test_pairs_of_one_prompt_do_not_meet():
    twin = ([1], [14], [15])
    made = sequences(Mismatched(None).batch(inputs(A, twin, B)))
    assert made[:3] == [([1], [21]), ([1], [21]), ([2, 3], [11, 12])]


def test_a_batch_of_one_prompt_takes_the_responses_of_the_batch_before():
    mismatched = Mismatched(None)
    assert mismatched.batch(inputs(A)) is None  # and the point stays what it was
    assert mismatched.point == 0
    assert sequences(mismatched.batch(inputs(B))) == [([2, 3], [11, 12]), ([2, 3], [13])]
    assert mismatched.batch(inputs(B)) is None
    assert sequences(mismatched.batch(inputs(C, C)))[:2] == [([4], [21])] * 2


def test_responses_are_cut_to_what_the_prompt_leaves():
    made = sequences(Mismatched(3).batch(inputs(A, B)))
    assert made == [([1], [21]), ([2, 3], [11]), ([1], [22, 23]), ([2, 3], [13])]
    assert sequences(Mismatched(1).batch(inputs(A, B)))[1] == ([2, 3], [])
