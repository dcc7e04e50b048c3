"""Parts of a prompt in columns of their own: a system message, an input, earlier turns."""

from __future__ import annotations

from typing import Any, overload

from fastpref.data.messages import Messages
from fastpref.data.readers import DataError, Record, kind_of

_SYSTEM = ("system", "system_prompt")
_OTHERS = ("input", "history")


@overload
def whole_prompt(row: Record, prompt: Messages) -> Messages: ...
@overload
def whole_prompt(row: Record, prompt: str | Messages) -> str | Messages: ...
def whole_prompt(row: Record, prompt: str | Messages) -> str | Messages:
    """The prompt of a row; text of the column `system` or `system_prompt` is its first message.

    Raises DataError where a column has a part that the prompt does not contain and that has no
    place in it: without the part, responses would be scored under another prompt. These are a
    system message before plain text or beside another one, and text in `input` or `history`.
    """
    for name in _SYSTEM:
        text = row.get(name)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{name} must be text, got {kind_of(text)}")
        if text and text.strip():
            prompt = _with_system(name, text, prompt)
    for name in _OTHERS:
        text = text_of(row.get(name))
        if text and text not in text_of(prompt):
            raise DataError(
                f"the column {name} has text that is not in the prompt; put it there, or leave "
                f"the column out with data.columns: {{{name}: null}}"
            )
    return prompt


def _with_system(name: str, text: str, prompt: str | Messages) -> str | Messages:
    has_message = isinstance(prompt, str) or (prompt and prompt[0].get("role") == "system")
    if has_message and text.strip() in text_of(prompt[:1] if isinstance(prompt, list) else prompt):
        return prompt
    if isinstance(prompt, str):
        raise DataError(
            f"{name} has text, for which a prompt of plain text has no place; write messages, or "
            f"leave the column out with data.columns: {{{name}: null}}"
        )
    if has_message:
        raise DataError(
            f"{name} is not the system message that the prompt begins with; remove one of them, or "
            f"leave the column out with data.columns: {{{name}: null}}"
        )
    return [{"role": "system", "content": text}, *prompt]


def text_of(value: Any) -> str:
    """Text of a column: its own, or the contents of its messages."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(text_of, value)))
    if isinstance(value, dict):
        return next(
            (text_of(value[name]) for name in ("content", "value", "text") if name in value), ""
        )
    return value.strip() if isinstance(value, str) else ""
