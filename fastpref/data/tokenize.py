"""Tokenize text groups and truncate them to the maximum length.

The prompt and each prompt + response are tokenized as whole texts, and responses start after the
longest token prefix that all of them share. A token that merges across the boundary therefore
belongs to the response and is the token that the model will see. The tokens of assistant messages
inside a response are found in the same way, from the texts up to where each begins and ends.
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
from fastpref.data.chat_template import ChatTemplate
from fastpref.data.conversation import LostText, NotScored, loses_reasoning, loses_system
from fastpref.data.formats import TextGroup
from fastpref.data.readers import DataError
from fastpref.losses import Kind
from fastpref.utils.errors import first_line

T = TypeVar("T")
Ids = np.ndarray[Any, np.dtype[np.int32]]
# Names of a group's responses in the counts.
PARTS: dict[Kind, tuple[str, ...]] = {
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
    """Tokenize batches of groups into lists of rows as in `dataset._SCHEMA`; updates `counts`.

    Groups with a response that has no token left are dropped, and those of which the chat template
    does not write what is scored. A thread encodes the next batch, without the GIL, while the rows
    of the current batch are built.
    """
    template = ChatTemplate(tokenizer, data)

    def rows(
        numbered: list[tuple[int, TextGroup]], sizes: list[int], encoding: Future[list[Any]]
    ) -> Any:
        texts = iter(encoding.result())
        candidates = (
            _row(number, group, [_ids(text) for text in islice(texts, size)])
            for (number, group), size in zip(numbered, sizes, strict=True)
        )
        return [row for row in candidates if row is not None]

    def _row(number: int, group: TextGroup, ids: list[Ids]) -> dict[str, Any] | None:
        counts["found"] += 1
        if group.sft_on is not None and group.conversational:
            _check_boundaries(ids, f"{source}, row {number}")
        elif group.conversational and not _continues_prompt(ids):
            _count_row("other_prompt", number, counts)
            return None
        if group.conversational:
            counts["conversations"] += 1
        tokens = _split_and_cut(ids[: 1 + len(group.responses)], group, tokenizer, data)
        mask = None
        if tokens is not None and group.sft_on == "assistant":
            mask = _mask(ids, len(tokens.responses[0]))
        if tokens is None or (mask is not None and not mask.any()):
            counts["no_completion"] += 1
            counts["no_text"] += not all(group.responses)
            return None
        counts["kept"] += 1
        counts["prompts_cut"] += tokens.prompt_cut
        counts["long_prompts_cut"] += tokens.long_prompt_cut
        for name, cut in zip(cycle(PARTS[kind]), tokens.cut, strict=False):
            counts[f"{name}_cut"] += cut
        return {
            "row": number,
            "prompt": tokens.prompt,
            "responses": tokens.responses,
            "labels": group.labels,
            "reference": group.reference_logps,
            "weights": _token_weights(group, tokens, f"{source}, row {number}"),
            "mask": mask,
            "margin": group.margin,
        }

    with ThreadPoolExecutor(1, "tokenizer") as thread:
        previous: list[Any] = []
        for numbered in batches:
            numbered, texts, special, sizes = _texts(numbered, source, tokenizer, template, counts)
            encoding = thread.submit(_encode, texts, special, tokenizer)
            if previous:
                yield rows(*previous)
            previous = [numbered, sizes, encoding]
        if previous:
            yield rows(*previous)


def _texts(
    numbered: list[tuple[int, TextGroup]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    counts: Counter[str],
) -> tuple[list[tuple[int, TextGroup]], list[str], list[bool], list[int]]:
    """The groups that can be scored, and their texts as `ChatTemplate.render` returns them.

    Also returns whether each text needs special tokens, and the number of texts of each group.
    """
    scored: list[tuple[int, TextGroup]] = []
    texts: list[str] = []
    special: list[bool] = []
    sizes: list[int] = []
    for number, group in numbered:
        try:
            rendered = template.render(group)
        except NotScored as problem:
            counts["found"] += 1
            name = "lost_text" if isinstance(problem, LostText) else "other_prompt"
            _count_row(name, number, counts)
            continue
        except Exception as error:  # a chat template may raise anything
            raise DataError(
                f"{source}, row {number}: chat template failed: {first_line(error)}; fix the row, "
                "or use another tokenizer in model.tokenizer"
            ) from None
        scored.append((number, group))
        if isinstance(group.prompt, list):
            _count_losses(number, group, rendered, counts)
        texts.extend(rendered)
        bos = tokenizer.bos_token
        beginning = rendered[-1 if group.sft_on == "all" else 0]
        add = not group.conversational and not (bos and beginning.startswith(bos))
        special.extend([add] * len(rendered))
        sizes.append(len(rendered))
    return scored, texts, special, sizes


def _count_losses(number: int, group: TextGroup, texts: list[str], counts: Counter[str]) -> None:
    """Count what the template leaves out of a group that is trained on."""
    if loses_system(group.prompt, texts[0]):  # type: ignore[arg-type]
        _count_row("lost_system", number, counts)
    responses = zip(group.responses, texts[1:], strict=False)
    if any(loses_reasoning(response, text) for response, text in responses):  # type: ignore[arg-type]
        _count_row("lost_reasoning", number, counts)


def _count_row(name: str, number: int, counts: Counter[str]) -> None:
    """Count a row, and keep the number of the first."""
    counts[name] += 1
    counts.setdefault(f"{name}_row", number)


def _encode(texts: list[str], special: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Encode texts, each with special tokens added where `special` is set; see `_ids`."""
    encoded: list[Any] = [None for _ in texts]
    for add in (True, False):
        indices = [i for i, flag in enumerate(special) if flag is add]
        encodings = _encode_batch([texts[i] for i in indices], add, tokenizer) if indices else []
        for i, encoding in zip(indices, encodings, strict=True):
            encoded[i] = encoding
    return encoded


def _encode_batch(texts: list[str], add: bool, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Encode texts, all with or all without special tokens, on the fastest path available."""

    def call(texts: list[str]) -> Any:
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(texts, add_special_tokens=add, **options)["input_ids"]

    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        return call(texts)
    # A regular call disables truncation and padding in the backend.
    call(["-"])
    return tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add)


def _ids(encoded: Any) -> Ids:
    """Token ids of a tokenizer's result for one text, an Encoding or a list."""
    return _int32(getattr(encoded, "ids", encoded))


def _int32(values: list[int]) -> Ids:
    return np.asarray(values, dtype=np.int32)


class _Tokens(NamedTuple):
    """Truncated token ids of a group."""

    prompt: Ids
    responses: list[Ids]
    prompt_cut: bool  # to `max_length`
    long_prompt_cut: bool  # to `max_prompt_length`
    lengths: list[int]  # of the responses before truncation
    closed: list[bool]  # whether an EOS was added to the response

    @property
    def cut(self) -> list[bool]:
        """Whether each response was truncated."""
        return [len(r) < n for r, n in zip(self.responses, self.lengths, strict=True)]


def _split_and_cut(
    ids: list[Ids],  # prompt, then prompt + response for each response
    group: TextGroup,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> _Tokens | None:
    """Split off the common prefix, add EOS, and truncate; None if a response has no token left."""
    prompt, *sequences = ids
    start = min((_common_prefix(prompt, sequence) for sequence in sequences), default=len(prompt))
    if group.sft_on == "all":
        prompt, start = sequences[0], 1
    responses = [sequence[start:] for sequence in sequences]
    eos = tokenizer.eos_token_id
    add_eos = data.add_eos and not group.conversational and eos is not None
    closed = [add_eos and not (len(r) and r[-1] == eos) for r in responses]
    end = _int32([eos] if add_eos else [])
    responses = [
        np.concatenate([r, end]) if c else r for r, c in zip(responses, closed, strict=True)
    ]
    context = prompt[:start]
    # The first response token needs a token that predicts it.
    if not len(context):
        opener = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if opener is None:
            return None
        context = _int32([opener])
    limit = data.max_prompt_length or len(context)
    long_prompt_cut, prompt_cut = len(context) > limit, False
    context = _keep_end(context, limit, tokenizer.bos_token_id)
    if data.truncation == "keep_end":
        excess = len(context) + max(map(len, responses)) - data.max_length
        prompt_cut = excess > 0 and len(context) > 1
        keep = max(1, len(context) - max(0, excess))
        context = _keep_end(context, keep, tokenizer.bos_token_id)
    room = data.max_length - len(context)
    lengths = [len(response) for response in responses]
    if room < 1 or not all(lengths):
        return None
    truncated = [response[:room] for response in responses]
    return _Tokens(context, truncated, prompt_cut, long_prompt_cut, lengths, closed)


def _keep_end(prompt: Ids, length: int, bos: int | None) -> Ids:
    """The last `length` tokens of a prompt, the first of them its BOS if it has one."""
    if length >= len(prompt):
        return prompt
    first = prompt[: int(prompt[0] == bos)]
    return np.concatenate([first, prompt[len(prompt) - length + len(first) :]])


def _check_boundaries(ids: list[Ids], where: str) -> None:
    """Raise DataError unless texts up to a boundary have the tokens of the whole conversation.

    The last token before a boundary may merge with the text behind it.
    """
    prompt, conversation, *others = ids
    for boundary in (prompt, *others):
        common = _common_prefix(boundary, conversation)
        if common < len(boundary) - 1:
            raise DataError(
                f"{where}: the tokenizer makes other tokens of the messages before an assistant "
                f"message than of the whole conversation, from token {common + 1} of "
                f"{len(boundary)}, so the tokens to train on are not known; use another tokenizer "
                "in model.tokenizer, or set data.sft_on=all"
            )


def _continues_prompt(ids: list[Ids]) -> bool:
    """Whether conversations have the tokens of the prompt; the last may merge with a response."""
    prompt, *conversations = ids
    return all(_common_prefix(prompt, other) >= len(prompt) - 1 for other in conversations)


def _mask(ids: list[Ids], length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each of the first `length` response tokens is of an assistant message, (length,)."""
    prompt, conversation, *others = ids
    start = _common_prefix(prompt, conversation)
    boundaries = [_common_prefix(boundary, conversation) - start for boundary in others]
    mask = np.zeros(len(conversation) - start, dtype=np.bool_)
    for begin, end in zip([0, *boundaries[1::2]], [*boundaries[::2], len(mask)], strict=True):
        mask[begin:end] = True
    return mask[:length]


def _common_prefix(first: Ids, second: Ids) -> int:
    """Length of the common prefix."""
    shortest = min(len(first), len(second))
    differ = first[:shortest] != second[:shortest]
    return int(differ.argmax()) if differ.any() else shortest


def _token_weights(group: TextGroup, tokens: _Tokens, where: str) -> list[list[float]] | None:
    """Weights of the tokens after truncation, with 1 for an added EOS.

    Raises DataError if their number is not the number of tokens.
    """
    if group.token_weights is None:
        return None
    truncated = []
    for k, (name, weights) in enumerate(zip(PARTS["pairwise"], group.token_weights, strict=True)):
        count = tokens.lengths[k] - tokens.closed[k]
        if len(weights) not in (count, tokens.lengths[k]):
            eos = " (and an EOS)" if tokens.closed[k] else ""
            raise DataError(
                f"{where}: {name}_weights has {len(weights):,} numbers, but the tokenizer makes "
                f"{count:,} tokens{eos} of {name}; give one weight per token, or set "
                "data.token_weights=false"
            )
        with_eos = weights if len(weights) == tokens.lengths[k] else [*weights, 1.0]
        truncated.append(with_eos[: len(tokens.responses[k])])
    return truncated


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
