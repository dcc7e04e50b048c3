"""Read the prompts of a data set in any format, tokenized as for training."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.data.dataset import Ids
from fastpref.data.formats import COLUMNS, TextGroup, to_groups
from fastpref.data.readers import DataError, Record, read_rows
from fastpref.data.tokenize import chunks, tokenize

# Columns that a prompt is rendered with.
_OF_PROMPTS = ("tools", "chat_template_kwargs", "system", "system_prompt", "input", "history")


class Prompt(NamedTuple):
    """A prompt as text and as token ids."""

    row: int  # row of the source, from 1
    text: TextGroup  # without responses
    ids: Ids


def read_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    duplicates: bool = False,
) -> list[Prompt]:
    """Read the first `limit` prompts of a file or Hub data set, distinct unless `duplicates`.

    Raises DataError if the data is unreadable or has no prompt.
    """
    prompts: list[Prompt] = []
    seen: set[bytes] = set()
    for numbered in chunks(_texts(source), 512):
        texts = dict(numbered)
        for row in encode(numbered, source, tokenizer):
            ids = row["prompt"]
            if duplicates or ids.tobytes() not in seen:
                seen.add(ids.tobytes())
                prompts.append(Prompt(row["row"], texts[row["row"]], ids))
            if len(prompts) == limit:
                return prompts
    if not prompts:
        raise DataError(f"{source}: has no rows; use data with at least one prompt")
    return prompts


def prompt_of(row: Record) -> TextGroup:
    """Prompt of a row of any format, or of a row with a prompt only.

    Raises DataError if the row has none.
    """
    matches = (k for k, names in COLUMNS.items() if all(row.get(n) is not None for n in names))
    kind = next(matches, None)
    if kind is None:
        prompt = row.get("prompt")
        if prompt is None:
            raise DataError(
                f"no prompt; columns found: {', '.join(map(str, row)) or 'none'}; expected prompt, "
                "or chosen and rejected, whose common prefix is the prompt"
            )
        kind, empty = "pointwise", response_to(prompt, "")
        kept = {name: row.get(name) for name in _OF_PROMPTS}
        row = {"prompt": prompt, **kept, "completion": empty, "label": 1}
    group = to_groups(row, kind, soft_labels=False)[0]
    return group._replace(responses=(), labels=None, reference_logps=None, token_weights=None)


def response_to(prompt: Any, text: str) -> Any:
    """Response in the form of its prompt: text, or a list with one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def encode(
    numbered: list[tuple[int, TextGroup]], source: str, tokenizer: PreTrainedTokenizerBase
) -> list[Record]:
    """Tokenize groups of any number of responses without truncation; see `tokenize.tokenize`."""
    counts: Counter[str] = Counter()
    untruncated = Data(train=source, max_length=sys.maxsize)
    (rows,) = tokenize([numbered], source, tokenizer, untruncated, "pointwise", counts)
    for name in ("lost_text", "other_prompt"):
        if counts[name]:
            raise DataError(
                f"{source}, row {counts[f'{name}_row']}: the chat template does not write the text "
                "of the prompt; use a model with another template"
            )
    if counts["no_completion"]:
        raise DataError(
            f"{source}: a prompt is empty, and the tokenizer has neither a BOS nor an EOS token to "
            "start it with; remove the row"
        )
    return rows


def _texts(source: str) -> Iterator[tuple[int, TextGroup]]:
    for number, row in read_rows(source):
        try:
            yield number, prompt_of(row)
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
