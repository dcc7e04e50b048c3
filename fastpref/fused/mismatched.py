"""Prompts of a batch paired with responses to other prompts, for KTO's reference point."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastpref.data.kto_mismatch import partners

Inputs = dict[str, Tensor]  # input_ids, attention_mask and completion_mask, each (S, L)


class Pair(NamedTuple):
    """The token ids of a prompt and of the two responses to it."""

    prompt: list[int]
    responses: tuple[list[int], list[int]]


class Mismatched:
    """Builds batches of mismatched responses, one per batch of pairs.

    Each prompt takes both responses of the next pair of its batch that has another prompt, going
    round. If a batch has only one prompt, such as one pair, it takes those of the previous batch.

    point: reference point () of the newest batch that had one, nats; 0 before the first, when
        policy and reference are still the same.
    """

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.point = torch.zeros((), dtype=torch.float64)
        self._previous: list[Pair] = []

    def batch(self, inputs: Inputs) -> Inputs | None:
        """The mismatched sequences (2B, L') of a batch of 2B; None if all prompts are the same.

        Responses are truncated to `max_length`. Reading the batch waits for the GPU.
        """
        pairs = _pairs(inputs)
        candidates = pairs
        partner_indices = _partners(pairs)
        if not partner_indices:
            candidates = pairs + self._previous
            partner_indices = _partners(candidates)[: len(pairs)]
        self._previous = pairs
        if not partner_indices:
            return None
        sequences = [
            (pair.prompt, candidates[partner].responses[k][: self._room(pair.prompt)])
            for k in (0, 1)
            for pair, partner in zip(pairs, partner_indices, strict=True)
        ]
        return _padded(sequences, inputs["input_ids"].device)

    def _room(self, prompt: list[int]) -> int | None:
        return None if self.max_length is None else max(self.max_length - len(prompt), 0)


def _pairs(inputs: Inputs) -> list[Pair]:
    names = ("input_ids", "attention_mask", "completion_mask")
    prompts, responses = [], []
    for row in zip(*(inputs[name].tolist() for name in names), strict=True):
        tokens = list(zip(*row, strict=True))
        prompts.append([i for i, real, scored in tokens if real and not scored])
        responses.append([i for i, _, scored in tokens if scored])
    count = len(prompts) // 2
    both = zip(responses[:count], responses[count:], strict=True)
    return [Pair(*pair) for pair in zip(prompts[:count], both, strict=True)]


def _partners(pairs: list[Pair]) -> list[int]:
    indices: list[int] = partners([str(pair.prompt).encode() for pair in pairs]).tolist()
    return indices


def _padded(sequences: list[tuple[list[int], list[int]]], device: torch.device) -> Inputs:
    columns = {
        "input_ids": [prompt + response for prompt, response in sequences],
        "attention_mask": [[1] * len(prompt + response) for prompt, response in sequences],
        "completion_mask": [
            [0] * len(prompt) + [1] * len(response) for prompt, response in sequences
        ],
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        for name, rows in columns.items()
    }
