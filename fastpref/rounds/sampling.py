"""Draw K completions of each prompt, in shards that survive a kill, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.data.pairs import draw_key
from fastpref.data.prompts import Prompt
from fastpref.data.tokenize import chunks
from fastpref.model.generate import Sampling, Sequences, text_after, until_end
from fastpref.model.policy import Policy
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.utils.progress import Display

Place = tuple[int, int]  # index of a prompt in its round, number of a completion from 0


class Request(NamedTuple):
    """One completion to draw."""

    place: Place
    prompt: list[int]  # token ids
    seed: int


class Drawn(NamedTuple):
    """Tokens of a completion, the end token included; not finished: cut at max_new_tokens."""

    place: Place
    tokens: list[int]
    finished: bool


class Engine(Protocol):
    """Source of completions."""

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        """Yield the completions of the requests that are not complete, in shards of any order."""


class TransformersEngine:
    """The policy in memory; a shard is one batch of prompts of similar length.

    Ranks draw whole batches, so that their number changes no completion.
    """

    def __init__(self, policy: Policy, ends: set[int], sampling: Sampling) -> None:
        self._policy, self._ends, self._sampling = policy, ends, sampling

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        missing = missing_batches(requests, complete, self._sampling.batch_size)
        for wave in chunks(missing, distributed.world_size()):
            # The last wave may have fewer batches than there are ranks.
            of_ranks = distributed.gather_objects(self._draw(self._batch_of_rank(wave)))
            for batch, sequences in zip(wave, of_ranks, strict=False):
                yield [
                    drawn(request.place, tokens, self._ends)
                    for request, tokens in zip(batch, sequences, strict=True)
                ]

    def _batch_of_rank(self, wave: Sequence[Sequence[Request]]) -> Sequence[Request]:
        """The batch of this rank; without one, of a sharded model the last, else an empty one."""
        number = distributed.rank()
        if number < len(wave):
            return wave[number]
        return wave[-1] if self._policy.sharded else []

    def _draw(self, batch: Sequence[Request]) -> Sequences:
        if not batch:
            return []
        sampling = replace(self._sampling, seed=batch[0].seed)
        return self._policy.generate([one.prompt for one in batch], self._ends, sampling)


def missing_batches(
    requests: Sequence[Request], complete: AbstractSet[Place], size: int
) -> list[Sequence[Request]]:
    """Batches of prompts of similar length in which a completion is missing.

    The other prompts of its batch decide a completion, by rounding and random numbers.
    """
    # The longest prompts come first: where memory is short, that is known at once.
    ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.place))
    return [
        batch
        for batch in chunks(ordered, size)
        if not all(request.place in complete for request in batch)
    ]


class MainProcessEngine:
    """An engine that rank 0 runs alone; all ranks get what it draws."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        shards = self._engine.draw(requests, complete)
        while (shard := distributed.on_main_process(lambda: next(shards, None))) is not None:
            yield [Drawn((prompt, k), tokens, ends) for (prompt, k), tokens, ends in shard]


def drawn(place: Place, tokens: list[int], ends: AbstractSet[int]) -> Drawn:
    """Return a completion up to its first end token."""
    ids = until_end(tokens, set(ends)).tolist()
    return Drawn(place, ids, bool(ids) and ids[-1] in ends)


@dataclass(frozen=True)
class Draw:
    """Everything that determines a file of samples, but for the weights.

    kind, key: of the file.
    """

    files: RoundFiles
    kind: str
    key: str
    prompts: Sequence[Prompt]
    samples: int  # completions of each prompt
    seed: int

    def requests(self) -> list[Request]:
        return [
            Request((index, number), prompt.ids.tolist(), self._seed_of(index, number))
            for index, prompt in enumerate(self.prompts)
            for number in range(self.samples)
        ]

    def _seed_of(self, index: int, number: int) -> int:
        return draw_key(self.seed, "sample", index, number) % 2**31


def sample(
    draw: Draw,
    engine: Callable[[], Engine],
    tokenizer: PreTrainedTokenizerBase,
    display: Display,
    check: Callable[[], None],
) -> list[Row]:
    """Read the completions from their file, or draw the missing ones and write it.

    engine: called if any is missing. check: called after each shard; it may end the run.

    A row for each prompt has its `prompt`, the `completions` as text, the `tokens` of each, and
    whether it is `finished`.
    """
    rows = distributed.on_main_process(lambda: draw.files.read(draw.kind, draw.key))
    if rows is not None:
        return rows
    shards = draw.files.shards(draw.kind, draw.key)
    saved = distributed.on_main_process(shards.read)
    complete = {(row["prompt"], row["sample"]): _from_row(row) for row in saved}
    requests = draw.requests()
    display.phase("sample", len(requests), len(complete))
    if len(complete) < len(requests):
        for shard in engine().draw(requests, complete.keys()):
            fresh = [one for one in shard if one.place not in complete]
            if fresh:
                fresh_rows = [_to_row(one) for one in fresh]
                distributed.on_main_process(partial(shards.append, fresh_rows))
                complete |= {one.place: one for one in fresh}
                display.advance(len(complete))
            check()
    rows = [_prompt_row(draw, index, complete, tokenizer) for index in range(len(draw.prompts))]

    def finish() -> None:
        draw.files.write(draw.kind, draw.key, rows)
        shards.remove()

    distributed.on_main_process(finish)
    return rows


def _to_row(one: Drawn) -> Row:
    prompt, number = one.place
    return {"prompt": prompt, "sample": number, "tokens": one.tokens, "finished": one.finished}


def _from_row(row: Row) -> Drawn:
    return Drawn((row["prompt"], row["sample"]), row["tokens"], row["finished"])


def _prompt_row(
    draw: Draw, index: int, complete: dict[Place, Drawn], tokenizer: PreTrainedTokenizerBase
) -> Row:
    prompt = draw.prompts[index]
    parts = [complete[index, number] for number in range(draw.samples)]
    return {
        "row": prompt.row,
        "prompt": prompt.text.prompt,
        **prompt.text.template_columns,
        "completions": [
            text_after(tokenizer, prompt.ids, np.asarray(part.tokens, dtype=np.int32))
            for part in parts
        ],
        "prompt_tokens": prompt.ids.tolist(),
        "tokens": [part.tokens for part in parts],
        "finished": [part.finished for part in parts],
    }
