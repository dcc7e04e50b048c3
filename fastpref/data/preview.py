"""The first rows of a data set as they are trained: texts, tokens, and what is cut or dropped."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.data import dropped
from fastpref.data.formats import RowKind, TextGroup, to_groups
from fastpref.data.readers import DataError, Record, read_rows
from fastpref.data.sft import group_kind, to_group
from fastpref.data.shards import shards_of
from fastpref.data.tokenize import PARTS, Ids, tokenize
from fastpref.losses import Kind

# Tokens of the prompt, tokens that are trained on, tokens of a response that are not, and tokens
# that truncation removes.
PieceKind = Literal["prompt", "response", "unscored", "cut"]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind as text."""

    kind: PieceKind
    text: str
    tokens: int


@dataclass(frozen=True)
class Part:
    """The prompt or a response: its name, in words also its label, and its tokens."""

    name: str
    pieces: tuple[Piece, ...]

    def tokens(self, *kinds: PieceKind) -> int:
        """Number of tokens of these kinds."""
        return sum(piece.tokens for piece in self.pieces if piece.kind in kinds)

    @property
    def summary(self) -> str:
        """Name and numbers of tokens."""
        length = sum(piece.tokens for piece in self.pieces if piece.kind != "cut")
        text = f"{self.name} {length:,} token{'s' * (length != 1)}"
        for kind, words in (("unscored", "not trained on"), ("cut", "cut")):
            if count := self.tokens(kind):  # type: ignore[arg-type]
                text += f", {count:,} {words}"
        return text


@dataclass(frozen=True)
class Preview:
    """A group of a row: its parts, and why it is dropped or stops the run if it does."""

    row: int  # of the source, from 1
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()  # such as a soft label
    dropped: str = ""
    error: str = ""

    @property
    def is_cut(self) -> bool:
        """Whether truncation removes any of its tokens."""
        return not self.dropped and any(part.tokens("cut") for part in self.parts)


def previews(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    rows: RowKind,
    limit: int,
    default_split: str = "train",
) -> Iterator[Preview]:
    """Yield the groups of the first `limit` rows, also those that training drops or refuses.

    rows: the kind of its rows, which decides the columns that are read.

    Raises DataError if not even the first row can be read.
    """
    for number, row in _rows(source, default_split, data, limit):
        try:
            if isinstance(row, DataError):
                raise row
            groups = _groups(row, rows, data)
            yield from [_preview(group, number, tokenizer, data, rows) for group in groups]
        except DataError as error:
            yield Preview(number, error=str(error))


def _rows(
    source: str, default_split: str, data: Data, limit: int
) -> Iterator[tuple[int, Record | DataError]]:
    """Rows with their numbers; the last may be the error that ends the reading."""
    last = 0
    if data.streaming and (shards := shards_of(source)):
        source = str(shards[0])
    try:
        rows = read_rows(source, default_split, data.columns, data.streaming)
        for number, row in islice(rows, limit):
            yield number, row
            last = number
    except DataError as error:
        if not last:
            raise
        yield last + 1, error


def _groups(row: Record, rows: RowKind, data: Data) -> list[TextGroup]:
    if rows == "sft":
        return [to_group(row, data.sft_on)]
    return to_groups(row, rows, data.soft_labels, data.token_weights)


def _preview(
    group: TextGroup, number: int, tokenizer: PreTrainedTokenizerBase, data: Data, rows: RowKind
) -> Preview:
    kind = group_kind(rows)
    unlimited = {"max_length": sys.maxsize, "max_prompt_length": None}
    row, counts = _tokenized(group, number, tokenizer, data, kind)
    whole, _ = _tokenized(group, number, tokenizer, data.model_copy(update=unlimited), kind)
    reason = "" if row else dropped.reason(counts)
    parts = _parts(whole, row, group, tokenizer, kind) if whole else _texts(group, kind)
    return Preview(number, tuple(parts), tuple(_notes(group, kind)), reason)


def _tokenized(
    group: TextGroup, number: int, tokenizer: PreTrainedTokenizerBase, data: Data, kind: Kind
) -> tuple[Record | None, Counter[str]]:
    """Token ids of a group as for training, None if it is dropped, and the counts of this."""
    counts: Counter[str] = Counter()
    try:
        (rows,) = tokenize([[(number, group)]], "-", tokenizer, data, kind, counts)
    except DataError as error:
        raise DataError(str(error).partition(f"-, row {number}: ")[2] or str(error)) from None
    return (rows[0] if rows else None), counts


def _parts(
    whole: Record,
    row: Record | None,
    group: TextGroup,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
) -> Iterator[Part]:
    """Parts of a group from its tokens without and with truncation; all is cut if it is dropped."""
    prompt: Ids = whole["prompt"]
    kept = 0 if row is None else len(row["prompt"])
    # Of a prompt that is cut the end is left, and its BOS.
    first = int(0 < kept < len(prompt) and row is not None and row["prompt"][0] == prompt[0])
    kinds: list[PieceKind] = ["cut"] * len(prompt)
    kinds[:first] = ["prompt"] * first
    kinds[len(prompt) - (kept - first) :] = ["prompt"] * (kept - first)
    yield Part("prompt", _pieces(prompt, kinds, tokenizer))
    names = _names(group, kind)
    for k, response in enumerate(whole["responses"]):
        left = 0 if row is None else len(row["responses"][k])
        scored = np.ones(left, bool) if row is None or row["mask"] is None else row["mask"]
        kinds = ["response" if is_scored else "unscored" for is_scored in scored]
        kinds += ["cut"] * (len(response) - left)
        yield Part(names[k], _pieces(response, kinds, tokenizer, prompt))


def _pieces(
    ids: Ids,
    kinds: Sequence[PieceKind],
    tokenizer: PreTrainedTokenizerBase,
    before: Ids | None = None,
) -> tuple[Piece, ...]:
    """Runs of tokens of one kind, decoded in the context of the tokens before them."""
    context: list[int] = [] if before is None else before.tolist()
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            run = ids[start:end].tolist()
            pieces.append(Piece(kinds[start], _decoded(run, context, tokenizer), len(run)))
            context, start = context + run, end
    return tuple(pieces)


def _decoded(ids: list[int], context: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of token ids; alone it may lack a space at its beginning."""
    before, text = _decode(context, tokenizer), _decode(context + ids, tokenizer)
    return text[len(before) :] if text.startswith(before) else _decode(ids, tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _texts(group: TextGroup, kind: Kind) -> Iterator[Part]:
    """Parts of a group that has no tokens, from its texts."""
    for name, value in zip(
        ("prompt", *_names(group, kind)), (group.prompt, *group.responses), strict=True
    ):
        text = value if isinstance(value, str) else "\n".join(map(_line, value))
        yield Part(name, (Piece("cut", text, 0),))


def _line(message: dict[str, Any]) -> str:
    return f"{message['role']}: {message.get('content') or ''}"


def _names(group: TextGroup, kind: Kind) -> list[str]:
    """Name of each response, with its label or score."""
    names = [name for name, _ in zip(cycle(PARTS[kind]), group.responses, strict=False)]
    if kind == "pairwise" or group.labels is None or group.sft_on is not None:
        return ["response" if name == "responses" else name for name in names]
    if kind == "groupwise":
        return [f"response with score {score:g}" for score in group.labels]
    return ["desirable response" if label else "undesirable response" for label in group.labels]


def _notes(group: TextGroup, kind: Kind) -> Iterator[str]:
    if kind == "pairwise" and group.labels is not None:
        yield f"p {group.labels[0]:g}"
    if group.margin is not None:
        yield f"margin {group.margin:g}"
    if group.reference_logps is not None:
        yield f"reference log-probs {', '.join(f'{logp:g}' for logp in group.reference_logps)}"
    if group.token_weights is not None:
        yield "weights for tokens"
    if group.tools is not None:
        yield f"{len(group.tools)} tool{'s' * (len(group.tools) != 1)}"
