"""Draw K completions of each prompt, in shards that survive a kill, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref.data.pairs import draw_key
from fastpref.data.prompts import Prompt
from fastpref.data.tokenize import chunks
from fastpref.model.generate import Sampling, text_after, until_end
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
    """The policy in memory; a shard is one batch of prompts of similar length."""

    def __init__(self, policy: Policy, ends: set[int], sampling: Sampling) -> None:
        self._policy, self._ends, self._sampling = policy, ends, sampling

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        # The longest prompts come first: where memory is short, that is known at once.
        ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.place))
        for batch in chunks(ordered, self._sampling.batch_size):
            # The other prompts of its batch decide a completion, by rounding and random numbers.
            if all(request.place in complete for request in batch):
                continue
            sampling = replace(self._sampling, seed=batch[0].seed)
            prompts = [request.prompt for request in batch]
            sequences = self._policy.generate(prompts, self._ends, sampling)
            yield [
                drawn(request.place, tokens, self._ends)
                for request, tokens in zip(batch, sequences, strict=True)
            ]


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
    rows = draw.files.read(draw.kind, draw.key)
    if rows is not None:
        return rows
    shards = draw.files.shards(draw.kind, draw.key)
    complete = {(row["prompt"], row["sample"]): _from_row(row) for row in shards.rows}
    requests = draw.requests()
    display.phase("sample", len(requests), len(complete))
    if len(complete) < len(requests):
        for shard in engine().draw(requests, complete.keys()):
            fresh = [one for one in shard if one.place not in complete]
            if fresh:
                shards.append([_to_row(one) for one in fresh])
                complete |= {one.place: one for one in fresh}
                display.advance(len(complete))
            check()
    rows = [_prompt_row(draw, index, complete, tokenizer) for index in range(len(draw.prompts))]
    draw.files.write(draw.kind, draw.key, rows)
    shards.remove()
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
