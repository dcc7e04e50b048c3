"""Groups of text → token ids, once: cut to length, stored as Arrow, mapped into memory.

The responses of a group start at the longest common token prefix of the prompt and of prompt +
response for each of them, all tokenised whole, so that a token that merges across the boundary is
scored and is the token that the model will see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.chat_template import render
from fastpref.data.formats import TextGroup
from fastpref.data.readers import DataError
from fastpref.losses import Kind
from fastpref.utils.errors import first_line

T = TypeVar("T")
Ids = np.ndarray[Any, np.dtype[np.int32]]
PARTS: dict[Kind, tuple[str, ...]] = {  # the responses of a group, as they are counted
    "pairwise": ("chosen", "rejected"),
    "pointwise": ("responses",),
    "groupwise": ("responses",),
}


def tokenize(
    batches: Iterable[list[tuple[int, TextGroup]]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    kind: Kind,
    counts: Counter[str],
) -> Iterator[list[dict[str, Any]]]:
    """Rows of `_SCHEMA`, a list a batch, for the groups whose responses all keep a token; `counts`
    is kept.

    A batch is encoded, which holds no lock, while the rows of the one before are made.
    """

    def rows(numbered: list[tuple[int, TextGroup]], encoding: Future[list[Any]]) -> Any:
        texts = iter(encoding.result())
        made = (
            _row(number, group, [_ids(text) for text in islice(texts, 1 + len(group.responses))])
            for number, group in numbered
        )
        return [row for row in made if row is not None]

    def _row(number: int, group: TextGroup, whole: list[Ids]) -> dict[str, Any] | None:
        counts["found"] += 1
        tokens = _split_and_cut(whole, group.conversational, tokenizer, data)
        if tokens is None:
            counts["no_completion"] += 1
            return None
        counts["kept"] += 1
        counts["prompts_cut"] += tokens.prompt_cut
        for name, cut in zip(cycle(PARTS[kind]), tokens.cut, strict=False):
            counts[f"{name}_cut"] += cut
        return {
            "row": number,
            "prompt": tokens.prompt,
            "responses": tokens.responses,
            "labels": group.labels,
            "reference": group.reference_logps,
            "weights": _token_weights(group, tokens, f"{source}, row {number}"),
        }

    with ThreadPoolExecutor(1, "tokenizer") as thread:
        before: list[Any] = []
        for numbered in batches:
            encoding = thread.submit(_encode, *_texts(numbered, source, tokenizer), tokenizer)
            if before:
                yield rows(*before)
            before = [numbered, encoding]
        if before:
            yield rows(*before)


def _texts(
    numbered: list[tuple[int, TextGroup]], source: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[bool]]:
    """Prompt, and prompt + response, of each group, and whether they lack special tokens."""
    texts: list[str] = []
    special: list[bool] = []
    for number, group in numbered:
        try:
            rendered = render(group, tokenizer)
        except Exception as error:  # a chat template may raise anything
            raise DataError(
                f"{source}, row {number}: chat template failed: {first_line(error)}; mend the row, "
                "or name another tokenizer in model.tokenizer"
            ) from None
        texts.extend(rendered)
        bos = tokenizer.bos_token
        add = not group.conversational and not (bos and rendered[0].startswith(bos))
        special.extend([add] * len(rendered))
    return texts, special


def _encode(texts: list[str], special: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Texts → what `_ids` takes; those that carry their special tokens are given no others."""
    encoded: list[Any] = [None for _ in texts]
    for add in (True, False):
        chosen = [i for i, flag in enumerate(special) if flag is add]
        found = _encode_alike([texts[i] for i in chosen], add, tokenizer) if chosen else []
        for i, tokens in zip(chosen, found, strict=True):
            encoded[i] = tokens
    return encoded


def _encode_alike(texts: list[str], add: bool, tokenizer: PreTrainedTokenizerBase) -> Any:
    def call(texts: list[str]) -> Any:
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(texts, add_special_tokens=add, **options)["input_ids"]

    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        return call(texts)
    call(["-"])  # sets the backend to cut and to pad nothing
    return tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add)


def _ids(encoded: Any) -> Ids:
    """Token ids of what a tokenizer made of a text: an Encoding, or a list."""
    return _int32(getattr(encoded, "ids", encoded))


def _int32(values: list[int]) -> Ids:
    return np.asarray(values, dtype=np.int32)


class _Tokens(NamedTuple):
    prompt: Ids
    responses: list[Ids]
    prompt_cut: bool
    lengths: list[int]  # of the responses before they were cut
    closed: list[bool]  # whether an EOS was added to the response

    @property
    def cut(self) -> list[bool]:
        return [len(r) < n for r, n in zip(self.responses, self.lengths, strict=True)]


def _split_and_cut(
    ids: list[Ids],  # prompt, then prompt + response for each response
    conversational: bool,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> _Tokens | None:
    """Common prefix, EOS, context and truncation; None where a response has no token left."""
    prompt, *wholes = ids
    start = min((_common_prefix(prompt, whole) for whole in wholes), default=len(prompt))
    responses = [whole[start:] for whole in wholes]
    eos = tokenizer.eos_token_id
    closes = data.add_eos and not conversational and eos is not None
    closed = [closes and not (len(r) and r[-1] == eos) for r in responses]
    end = _int32([eos] if closes else [])
    responses = [
        np.concatenate([r, end]) if c else r for r, c in zip(responses, closed, strict=True)
    ]
    context = prompt[:start]
    if not len(context):  # something must predict the first token
        opener = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if opener is None:
            return None
        context = _int32([opener])
    prompt_cut = False
    if data.truncation == "keep_end":
        excess = len(context) + max(map(len, responses)) - data.max_length
        if excess > 0 and len(context) > 1:
            keep = max(1, len(context) - excess)
            first = context[: int(context[0] == tokenizer.bos_token_id)]
            context = np.concatenate([first, context[len(context) - keep + len(first) :]])
            prompt_cut = True
    room = data.max_length - len(context)
    lengths = [len(response) for response in responses]
    if room < 1 or not all(lengths):
        return None
    kept = [response[:room] for response in responses]
    return _Tokens(context, kept, prompt_cut, lengths, closed)


def _common_prefix(first: Ids, second: Ids) -> int:
    """How many tokens both begin with."""
    shortest = min(len(first), len(second))
    differ = first[:shortest] != second[:shortest]
    return int(differ.argmax()) if differ.any() else shortest


def _token_weights(group: TextGroup, tokens: _Tokens, where: str) -> list[list[float]] | None:
    """Weights of the tokens that are left, 1 for an EOS that was added; DataError if they differ in
    number from what the tokenizer made."""
    if group.token_weights is None:
        return None
    fitted = []
    for k, (name, weights) in enumerate(zip(PARTS["pairwise"], group.token_weights, strict=True)):
        own = tokens.lengths[k] - tokens.closed[k]
        if len(weights) not in (own, tokens.lengths[k]):
            eos = " (and an EOS)" if tokens.closed[k] else ""
            raise DataError(
                f"{where}: {name}_weights has {len(weights):,} numbers, but the tokenizer makes "
                f"{own:,} tokens{eos} of {name}; give one for each, or set data.token_weights=false"
            )
        whole = weights if len(weights) == tokens.lengths[k] else [*weights, 1.0]
        fitted.append(whole[: len(tokens.responses[k])])
    return fitted


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
