"""Find the text of messages in a conversation as a chat template wrote it.

White space is not compared, since templates strip it.
"""

from __future__ import annotations

from typing import Any

from fastpref.data.messages import REASONING, Messages, text_of

# Shorter texts may be found in the words of a template by chance, as `a` in `assistant`.
_SHORT = 12
_PROBE = "Zq0xProbe{}Zq0xEnd"


def scored_texts(messages: Messages, with_reasoning: bool = False) -> list[str]:
    """Texts of the assistant messages, in order, and names of the functions that they call.

    with_reasoning: the reasoning of the last message, too; templates leave out earlier reasoning.
    """
    texts: list[str] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if with_reasoning and position == len(messages) - 1:
            texts.append(next((str(message[key]) for key in REASONING if message.get(key)), ""))
        texts.append(text_of(message.get("content")))
        texts += _called(message.get("tool_calls"))
    return [text for text in texts if text.strip()]


def find(texts: list[str], conversation: str, start: int) -> int | None:
    """Position of the first of the texts behind `start`, with the others behind it in order.

    Returns `start` if there are no texts, and None if one of them is missing.
    """
    first: int | None = None
    for text in texts:
        span = _find(text, conversation, start)
        if span is None:
            return None
        begin, start = span
        first = begin if first is None else first
    return start if first is None else first


def has_short(messages: Messages) -> bool:
    """Whether an assistant message has a text that may be found by chance."""
    return any(
        0 < len(_bare(text_of(message.get("content")))) < _SHORT
        for message in messages
        if message["role"] == "assistant"
    )


def probes(messages: Messages) -> Messages:
    """The messages with long, unique texts in the place of short ones of the assistant."""
    return [
        _with_text(message, _PROBE.format(position)) if has_short([message]) else message
        for position, message in enumerate(messages)
    ]


def _with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A message with another text in the form of its content."""
    parts = isinstance(message["content"], list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def _called(calls: Any) -> list[str]:
    """Names of the functions of tool calls."""
    if not isinstance(calls, list):
        return []
    functions = (call.get("function") or call for call in calls if isinstance(call, dict))
    names = (call.get("name") for call in functions if isinstance(call, dict))
    return [name for name in names if isinstance(name, str)]


def _find(text: str, conversation: str, start: int) -> tuple[int, int] | None:
    """Begin and end of a text in a conversation, behind `start`."""
    text = text.strip()
    begin = conversation.find(text, start)
    if begin >= 0:
        return begin, begin + len(text)
    places = [k for k in range(start, len(conversation)) if not conversation[k].isspace()]
    bare = _bare(text)
    begin = "".join(conversation[k] for k in places).find(bare)
    return None if begin < 0 else (places[begin], places[begin + len(bare) - 1] + 1)


def _bare(text: str) -> str:
    return "".join(text.split())
