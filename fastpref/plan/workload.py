"""The forward passes of each step: the batch plan of a run, over lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from fastpref.config import Training
from fastpref.data.batch_plan import Layout, Plan, tokens_of
from fastpref.data.dataset import UNITS, Groups, Lengths
from fastpref.losses import Kind


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of N groups: the lengths of `fastpref.data.dataset.Groups`, without their tokens."""

    kind: Kind
    prompt_lengths: Lengths  # (N,)
    response_lengths: Lengths  # (offsets[N],)
    offsets: Lengths  # (N + 1,)

    @classmethod
    def of(cls, groups: Groups) -> GroupLengths:
        return cls(groups.kind, groups.prompt_lengths, groups.response_lengths, groups.offsets)

    @classmethod
    def uniform(cls, kind: Kind, count: int, prompt: int, responses: Sequence[int]) -> GroupLengths:
        """`count` groups of the same lengths."""
        return cls(
            kind,
            np.full(count, prompt),
            np.tile(np.array(responses), count),
            np.arange(count + 1) * len(responses),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def padded_lengths(self) -> Lengths:
        longest = np.maximum.reduceat(self.response_lengths, self.offsets[:-1])
        return self.prompt_lengths + longest

    def truncate(self, max_length: int) -> GroupLengths:
        """Cut responses so that prompt + response fits; drop groups whose prompt leaves no room."""
        counts = np.diff(self.offsets)
        has_room = self.prompt_lengths < max_length
        room = (max_length - self.prompt_lengths).repeat(counts)
        responses = np.minimum(self.response_lengths, room)[has_room.repeat(counts)]
        offsets = np.concatenate([[0], counts[has_room].cumsum()])
        return GroupLengths(self.kind, self.prompt_lengths[has_room], responses, offsets)

    def group(self, index: int) -> list[int]:
        """Tokens of the prompt and of each response of a group."""
        responses = self.response_lengths[self.offsets[index] : self.offsets[index + 1]]
        return [int(n) for n in (self.prompt_lengths[index], *responses)]


class Pass(NamedTuple):
    """One forward pass, of one or more groups."""

    tokens: int  # positions, padding included
    scored: int  # tokens of the responses
    attended: int  # pairs of tokens in which one attends to the other
    batch_passes: int = 1  # forward passes of its micro-batch; all precede the backward passes


MicroBatch = tuple[Pass, ...]
Step = list[MicroBatch]


def steps_of(
    training: Training, layout: Layout, lengths: GroupLengths, ranks: int, one_by_one: bool
) -> list[Step]:
    """The steps of the first epoch on the first rank, which has the fullest batches.

    one_by_one: a forward pass for each group. Raises DataError if the longest group does not fit.
    """
    groups = cast(Groups, lengths)
    counts = np.diff(lengths.offsets)
    padded = layout == "padded"
    costs = lengths.padded_lengths if padded else tokens_of(groups, layout)
    plan = Plan(
        costs,
        counts if padded else None,
        training.batch_size,
        training.micro_batch_tokens,
        training.seed,
        UNITS[lengths.kind],
        ranks,
    )
    scored = np.add.reduceat(lengths.response_lengths, lengths.offsets[:-1])
    attended = _attended(lengths, layout)

    def pass_over(indices: Sequence[int], batch_passes: int) -> Pass:
        index = np.array(indices)
        if not padded:
            return Pass(
                _sum(costs[index]), _sum(scored[index]), _sum(attended[index]), batch_passes
            )
        rows, width = _sum(counts[index]), int(costs[index].max())
        return Pass(rows * width, _sum(scored[index]), rows * _triangle(width), batch_passes)

    def passes(indices: Sequence[int]) -> MicroBatch:
        parts = [[index] for index in indices] if one_by_one else [indices]
        return tuple(pass_over(part, len(parts)) for part in parts)

    number = min(plan.steps_per_epoch, training.steps or plan.steps_per_epoch)
    return [[passes(i or [plan.shortest]) for i in plan.step(k)] for k in range(number)]


def _attended(lengths: GroupLengths, layout: Layout) -> Lengths:
    """Attended pairs of tokens of each group in packed rows, (N,); a token attends to itself."""
    counts = np.diff(lengths.offsets)
    prompts = lengths.prompt_lengths.repeat(counts)
    by_response = prompts * lengths.response_lengths + _triangle(lengths.response_lengths)
    copies = 1 if layout == "prefix_shared" else counts
    pairs = np.add.reduceat(by_response, lengths.offsets[:-1])
    return pairs + copies * _triangle(lengths.prompt_lengths)


def _triangle(length: Any) -> Any:
    return length * (length + 1) // 2


def _sum(lengths: Lengths) -> int:
    return int(lengths.sum())
