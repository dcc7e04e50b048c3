"""Messages of a conversation in one form, whatever names a data set has for their fields and roles.

A message is `{"role", "content"}`, or `{"from", "value"}` as in ShareGPT. Roles are compared
without case. The content is text, or a list of parts that hold text; a message with calls or
reasoning may have none.
"""

from __future__ import annotations

from typing import Any

from fastpref.data.readers import DataError, kind_of
from fastpref.utils.errors import shown

Messages = list[dict[str, Any]]
# Names of roles in public data sets, in lower case.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
KNOWN_ROLES = frozenset({"assistant", "developer", "ipython", "system", "tool", "user"})
# Fields of reasoning, each of which transformers passes to a template under all of these names.
REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS = ("role", "content", "from", "value")
_CALLS = ("tool_calls", "function_call")
# Types of parts with text, and the field of the text.
_TEXT_TYPES = ("text", "input_text", "output_text")


def normalized(name: str, value: Any) -> Messages:
    """Messages with the roles and the fields that chat templates know.

    name: of the column, for messages of errors.

    Raises DataError if the value is no list of messages, or has content other than text.
    """
    if not isinstance(value, list):
        raise _no_list(name)
    return [_normalized(name, message) for message in value]


def text_of(content: Any) -> str:
    """Text of a content, whose parts are joined without anything between them."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _normalized(name: str, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and message.get("role") is None and "from" in message:
        content = message.get("content") if message.get("value") is None else message["value"]
        rest = {key: item for key, item in message.items() if key not in _FIELDS}
        message = {"role": message["from"], "content": content, **rest}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _no_list(name)
    changes: dict[str, Any] = {}
    role = message["role"].strip().lower()
    role = _ROLES.get(role, role if role in KNOWN_ROLES else message["role"])
    if role != message["role"]:
        changes["role"] = role
    content = message.get("content")
    if isinstance(content, list):
        changes["content"] = [_text_part(name, part) for part in content]
    elif content is None:
        if not any(message.get(key) for key in (*_CALLS, *REASONING)):
            raise DataError(
                f"{name} has a message of role {shown(role)} without content; give it text, or "
                "remove the row"
            )
    elif not isinstance(content, str):
        raise DataError(
            f"{name} has a content that is {kind_of(content)}; it must be text or a list of parts "
            "of text"
        )
    return {**message, **changes} if changes else message


def _text_part(name: str, part: Any) -> dict[str, str]:
    """A part of a content with its type and text alone, as templates that know parts expect it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") or "text" if isinstance(part, dict) else kind_of(part)
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_TYPES or not isinstance(text, str):
        kind = "other than text" if kind in _TEXT_TYPES else f"of type {shown(kind)}"
        raise DataError(
            f"{name} has a part {kind} in its content; only text is trained on, remove the row"
        )
    return {"type": "text", "text": text}


def _no_list(name: str) -> DataError:
    return DataError(f"{name} must be a list of {{role, content}} messages")


def check_text(name: str, value: Any) -> None:
    """Raise DataError for a lone surrogate in a text, or in any text of messages or tools."""
    if isinstance(value, list):
        for item in value:
            check_text(name, item)
    elif isinstance(value, dict):
        check_text(name, [*value, *value.values()])
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name} is not valid Unicode at character {error.start}; it holds half of a "
                "surrogate pair, leave it out"
            ) from None
