"""Prompts of a run, and those of each round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref.data.prompts import Prompt, read_prompts
from fastpref.utils.errors import UserError


def load_prompts(
    field: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    note: Callable[[str], object],
    limit: int | None = None,
) -> list[Prompt]:
    """Read the different prompts of a source that leave room for a completion.

    field: of the config, for messages. room: largest number of tokens of a prompt.

    Raises UserError if none is left.
    """
    prompts = read_prompts(source, tokenizer, limit)
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not fitting:
        raise UserError(
            f"{field}: no prompt of {source} has at most {room:,} tokens, which leaves room for "
            "rounds.sampling.max_new_tokens in data.max_length; raise data.max_length"
        )
    long = len(prompts) - len(fitting)
    note(f"prompts: {len(fitting):,} different ones of {source}, {long:,} left out as too long")
    return fitting


def prompts_of_round(count: int, number: int, per_round: int, seed: int) -> list[int]:
    """Indices of the prompts of round `number`, from 1, out of `count`.

    Rounds take the next prompts of a shuffled order, and of another one for each pass over them; a
    round has no prompt twice unless it has more than there are.
    """
    first = (number - 1) * per_round
    indices: list[int] = []
    while len(indices) < per_round:
        epoch, position = divmod(first + len(indices), count)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        indices += [int(k) for k in order[position : position + per_round - len(indices)]]
    return sorted(indices)
