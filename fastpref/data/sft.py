"""Rows for supervised fine-tuning on single responses.

| columns | `completion` trains on | `assistant` trains on |
|---|---|---|
| `messages`, or `conversations` | the last assistant message | every assistant message |
| `prompt`, `completion` as messages | the completion | every assistant message of both |
| `prompt`, `completion` as text | the completion | – |

`all` trains on every token of prompt and completion, or of all messages, but the first. Otherwise
messages after the last assistant message are left out. Messages may have the optional columns
`tools`, `chat_template_kwargs` and `system`. Other columns are ignored, but `label` must not be
false.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastpref.config import Data
from fastpref.data.formats import (
    RowKind,
    SftOn,
    TextGroup,
    messages_of,
    read_groups,
    split_prompt,
)
from fastpref.data.messages import Messages
from fastpref.data.prompt_parts import whole_prompt
from fastpref.data.readers import DataError, Record, read_rows
from fastpref.data.shards import shards_of
from fastpref.data.template_columns import template_columns
from fastpref.losses import Kind, Objective
from fastpref.losses.normalized import SFT
from fastpref.utils.errors import shown

_ACCEPTED = "prompt, completion | messages | prompt, chosen, rejected"


def row_kind(loss: Objective, data: Data) -> RowKind:
    """Kind of the rows of `data.train`: "sft" for SFT on rows that are no pairs, by the first row.

    Raises DataError if the file cannot be read, or has pairs and `data.sft_on` is not for them.
    """
    if not isinstance(loss, SFT):
        return loss.kind
    first, *others = data.sources("train")
    if data.streaming:
        return _sft_rows(loss, data)
    kind = _sft_rows(loss, data.of(first))
    for source in others:
        if _sft_rows(loss, data.of(source)) != kind:
            raise DataError(
                f"{source.location}: has other rows than {first.location}, of which one has pairs "
                "and one single responses; give all sources of data.train the same"
            )
    return kind


def _sft_rows(loss: SFT, data: Data) -> RowKind:
    """Kind of the rows of `data.train`, one source."""
    source = str(data.train)
    if data.streaming and (paths := shards_of(source)):
        source = str(paths[0])
    rows = read_rows(source, columns=data.columns, streaming=data.streaming)
    _, first = next(rows, (0, {"chosen": ""}))
    if all(first.get(name) is None for name in ("chosen", "rejected")):
        return "sft"
    if data.sft_on != "completion":
        raise DataError(
            f"data.sft_on: {data.sft_on} is for rows with completion or messages, and "
            f"{source} has pairs, of which chosen is trained on; remove it"
        )
    return loss.kind


def group_kind(rows: RowKind) -> Kind:
    """Kind of the groups that rows become."""
    return "pointwise" if rows == "sft" else rows


def read_rows_of(
    source: str, rows: RowKind, data: Data, default_split: str = "train"
) -> Iterator[tuple[int, TextGroup]]:
    """Yield the groups of all rows of a kind, as `read_groups` does."""
    if rows != "sft":
        yield from read_groups(
            source,
            rows,
            default_split,
            data.soft_labels,
            data.token_weights,
            data.columns,
            data.streaming,
        )
        return
    for number, row in read_rows(source, default_split, data.columns, data.streaming):
        try:
            group = to_group(row, data.sft_on)
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        yield number, group


def to_group(row: Record, sft_on: SftOn = "completion") -> TextGroup:
    """Convert a row to a prompt and its response; raises DataError if the row is invalid."""
    options = template_columns(row)
    column = "messages" if row.get("messages") is not None else "conversations"
    if row.get(column) is not None:
        if row.get("completion") is not None:
            raise DataError("has messages and completion; remove one of the columns")
        messages = whole_prompt(row, messages_of(column, row[column]))
        group = _conversation(messages, sft_on)
        return group._replace(**options)
    missing = [name for name in ("prompt", "completion") if row.get(name) is None]
    if missing:
        raise DataError(
            f"no {' and no '.join(missing)}; columns found: {', '.join(map(str, row)) or 'none'}; "
            f"formats accepted for sft: {_ACCEPTED}, the same in all rows"
        )
    label = row.get("label")
    if label is not None and not label:
        raise DataError(
            f"label is {shown(label)}, and sft trains on every completion; remove the row, or the "
            "column label"
        )
    prompt, (completion,) = split_prompt(row["prompt"], {"completion": row["completion"]})
    prompt = whole_prompt(row, prompt)
    if isinstance(prompt, str):
        return _text(prompt, str(completion), sft_on)
    if sft_on == "completion":
        return TextGroup(prompt, (completion,), labels=(1.0,), sft_on=sft_on, **options)
    assert isinstance(completion, list)
    group = _conversation([*prompt, *completion], sft_on)
    return group._replace(**options)


def _text(prompt: str, completion: str, sft_on: SftOn) -> TextGroup:
    if sft_on == "assistant":
        raise DataError(
            "data.sft_on: assistant needs messages, and prompt and completion are text; set "
            "data.sft_on=completion"
        )
    if sft_on == "all":
        prompt, completion = "", prompt + completion
    return TextGroup(prompt, (completion,), labels=(1.0,), sft_on=sft_on)


def _conversation(messages: Messages, sft_on: SftOn) -> TextGroup:
    """Split a conversation before the first message to train on, and end it after the last."""
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    first, last = 0, len(messages)
    if sft_on != "all":
        if not turns:
            raise DataError("messages have no assistant message to train on; remove the row")
        first, last = turns[-1 if sft_on == "completion" else 0], turns[-1] + 1
        if first == 0:
            raise DataError(
                "messages begin with the assistant message to train on; begin with a user or "
                "system message, or set data.sft_on=all"
            )
    if not messages:
        raise DataError("messages are empty; remove the row")
    prompt, response = messages[:first], messages[first:last]
    return TextGroup(prompt, (response,), labels=(1.0,), sft_on=sft_on)
