"""The prompt of a pair, and columns that hold it under another name."""

from __future__ import annotations

from typing import Any

from fastpref.data.prompt_parts import text_of
from fastpref.data.readers import DataError, Record

# Names that public data sets give to prompts.
_PROMPTS = ("question", "instruction", "query", "problem", "input", "history")
_CONVERSATIONS = ("conversations", "conversation")


def prompt_of(row: Record) -> Any:
    """The column `prompt`, or the `conversations` before responses that are messages; else None.

    Raises DataError if there is no prompt, and a column that usually holds one has text that is not
    in `chosen`: without it the response would be scored as if nobody had asked.
    """
    prompt = row.get("prompt")
    if prompt is not None:
        return prompt
    chosen = row["chosen"]
    answers = isinstance(chosen, dict) or (isinstance(chosen, list) and len(chosen) == 1)
    for name in _CONVERSATIONS:
        if answers and isinstance(row.get(name), list) and row[name]:
            return row[name]
    for name in (*_CONVERSATIONS, *_PROMPTS):
        text = text_of(row.get(name))
        if text and text not in text_of(chosen):
            raise DataError(
                f"no prompt, and the column {name} is not in chosen; set data.columns: {{prompt: "
                f"{name}}}, or remove the column"
            )
    return None
