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
        """The lengths of all groups; of a mixture, those of its first epoch."""
        lengths = cls(groups.kind, groups.prompt_lengths, groups.response_lengths, groups.offsets)
        mixture = getattr(groups, "mixture", None)
        return lengths if mixture is None else lengths.take(mixture.order(0, 0))

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

    def take(self, indices: Lengths) -> GroupLengths:
        """The groups of these indices, in their order."""
        counts = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], counts.cumsum()])
        starts = (self.offsets[indices] - offsets[:-1]).repeat(counts)
        responses = self.response_lengths[starts + np.arange(offsets[-1])]
        return GroupLengths(self.kind, self.prompt_lengths[indices], responses, offsets)

    def group(self, index: int) -> list[int]:
        """Tokens of the prompt and of each response of a group."""
        responses = self.response_lengths[self.offsets[index] : self.offsets[index + 1]]
        return [int(n) for n in (self.prompt_lengths[index], *responses)]


class Pass(NamedTuple):
    """One forward pass, of one or more groups."""

    tokens: int  # positions, padding included
    scored: int  # tokens of the responses; of a reward model, their last ones
    attended: int  # pairs of tokens in which one attends to the other
    batch_passes: int = 1  # forward passes of its micro-batch; all precede the backward passes


MicroBatch = tuple[Pass, ...]
Step = list[MicroBatch]


def steps_of(
    training: Training,
    micro_batch_tokens: int,
    layout: Layout,
    lengths: GroupLengths,
    ranks: int,
    one_by_one: bool,
    of_rewards: bool = False,
) -> list[Step]:
    """The steps of the first epoch on the first rank, which has the fullest batches.

    one_by_one: a forward pass for each group. of_rewards: for a reward model. Raises DataError if
    the longest group does not fit.
    """
    groups = cast(Groups, lengths)
    counts = np.diff(lengths.offsets)
    padded = layout == "padded"
    costs = lengths.padded_lengths if padded else tokens_of(groups, layout)
    plan = Plan(
        costs,
        counts if padded else None,
        training.batch_size,
        micro_batch_tokens,
        training.seed,
        UNITS[lengths.kind],
        ranks,
    )
    scored = _scored(lengths, of_rewards)
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


class StepBounds(NamedTuple):
    """Sizes of a rank's steps, whatever the order of the groups and the size of a micro-batch."""

    longest: int  # tokens of the longest group
    shortest: int
    tokens: int  # most tokens of a step
    groups: int  # most groups of a step
    scored_share: float  # largest share of a group's tokens that is scored
    mean: Pass  # mean step, as if in one pass


def step_bounds(
    batch_size: int,
    layout: Layout,
    lengths: GroupLengths,
    ranks: int,
    of_rewards: bool = False,
) -> StepBounds:
    """Bounds of the steps of a run with these lengths."""
    costs = tokens_of(cast(Groups, lengths), layout)
    scored = _scored(lengths, of_rewards)
    count = min(batch_size, len(costs))
    longest_first = np.sort(costs)[::-1]
    # Ranks have similar loads: they differ by one group at most.
    tokens = _sum(longest_first[:count])
    if layout == "padded":  # all rows of a micro-batch are as long as its longest
        rows = np.sort(np.diff(lengths.offsets))[::-1][:count]
        tokens = _sum(rows) * int(lengths.padded_lengths.max())
    if ranks > 1:
        tokens = min(tokens, -(-tokens // ranks) + int(longest_first[0]))
    share = count / ranks
    mean = (float(values.mean()) * share for values in (costs, scored, _attended(lengths, layout)))
    return StepBounds(
        longest=int(longest_first[0]),
        shortest=int(longest_first[-1]),
        tokens=tokens,
        groups=count,
        scored_share=float((scored / costs).max()),
        mean=Pass(*(max(1, round(value)) for value in mean)),
    )


def _scored(lengths: GroupLengths, of_rewards: bool) -> Lengths:
    """Tokens of each group whose hidden states the head reads, (N,)."""
    if of_rewards:
        return np.diff(lengths.offsets)
    return np.add.reduceat(lengths.response_lengths, lengths.offsets[:-1])


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
