"""Which tokens meet in a step: the plan of a run over lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from fastpref.config import Config
from fastpref.data.batch_plan import Layout, Plan, tokens_of
from fastpref.data.dataset import UNITS, Groups, Lengths
from fastpref.losses import Kind
from fastpref.model.batch_layout import wanted_layout


@dataclass(frozen=True)
class Sizes:
    """Tokens of N groups; see `fastpref.data.tokenize.Groups`, of which it is a part."""

    kind: Kind
    prompt_lengths: Lengths  # (N,)
    response_lengths: Lengths  # (offsets[N],)
    offsets: Lengths  # (N + 1,)

    @classmethod
    def of(cls, groups: Groups) -> Sizes:
        return cls(groups.kind, groups.prompt_lengths, groups.response_lengths, groups.offsets)

    @classmethod
    def alike(cls, kind: Kind, count: int, prompt: int, responses: Sequence[int]) -> Sizes:
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

    def cut(self, max_length: int) -> Sizes:
        """With responses cut where prompt and response exceed a length; groups without room go."""
        counts = np.diff(self.offsets)
        kept = self.prompt_lengths < max_length
        room = (max_length - self.prompt_lengths).repeat(counts)
        responses = np.minimum(self.response_lengths, room)[kept.repeat(counts)]
        offsets = np.concatenate([[0], counts[kept].cumsum()])
        return Sizes(self.kind, self.prompt_lengths[kept], responses, offsets)

    def group(self, index: int) -> list[int]:
        """Tokens of the prompt and of the responses of a group."""
        own = self.response_lengths[self.offsets[index] : self.offsets[index + 1]]
        return [int(n) for n in (self.prompt_lengths[index], *own)]


class Pass(NamedTuple):
    """One forward pass, of one or more groups."""

    tokens: int  # positions, with their padding
    scored: int  # tokens of the responses
    attended: int  # pairs of tokens of which one attends to the other
    beside: int = 1  # passes of its micro-batch, which await their backward passes together


MicroBatch = tuple[Pass, ...]
Step = list[MicroBatch]


def steps_of(config: Config, sizes: Sizes, ranks: int, one_by_one: bool) -> list[Step]:
    """The steps of the first epoch as the first rank sees them, which has the fullest batches.

    one_by_one: a forward pass for each group. Raises DataError where the longest does not fit.
    """
    layout, training = wanted_layout(config), config.training
    groups = cast(Groups, sizes)
    counts = np.diff(sizes.offsets)
    padded = layout == "padded"
    costs = sizes.padded_lengths if padded else tokens_of(groups, layout)
    plan = Plan(
        costs,
        counts if padded else None,
        training.batch_size,
        training.micro_batch_tokens,
        training.seed,
        UNITS[sizes.kind],
        ranks,
    )
    scored = np.add.reduceat(sizes.response_lengths, sizes.offsets[:-1])
    attended = _attended(sizes, layout)

    def pass_over(indices: Sequence[int], beside: int) -> Pass:
        own = np.array(indices)
        if not padded:
            return Pass(_sum(costs[own]), _sum(scored[own]), _sum(attended[own]), beside)
        rows, width = _sum(counts[own]), int(costs[own].max())
        return Pass(rows * width, _sum(scored[own]), rows * _triangle(width), beside)

    def passes(indices: Sequence[int]) -> MicroBatch:
        parts = [[index] for index in indices] if one_by_one else [indices]
        return tuple(pass_over(part, len(parts)) for part in parts)

    number = min(plan.steps_per_epoch, training.steps or plan.steps_per_epoch)
    return [[passes(i or [plan.shortest]) for i in plan.step(k)] for k in range(number)]


def _attended(sizes: Sizes, layout: Layout) -> Lengths:
    """Pairs of tokens of each group, (N,), in packed rows; a token attends to itself."""
    counts = np.diff(sizes.offsets)
    prompts = sizes.prompt_lengths.repeat(counts)
    own = prompts * sizes.response_lengths + _triangle(sizes.response_lengths)
    copies = 1 if layout == "prefix_shared" else counts
    pairs = np.add.reduceat(own, sizes.offsets[:-1])
    return pairs + copies * _triangle(sizes.prompt_lengths)


def _triangle(length: Any) -> Any:
    return length * (length + 1) // 2


def _sum(lengths: Lengths) -> int:
    return int(lengths.sum())
