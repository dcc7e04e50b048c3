"""Contents as text or as lists of parts, whichever a chat template reads.

Some templates write the text of a list of parts, some drop it or write Python's form of the list,
and some read nothing but lists. Two renderings of probes tell which a template does for a role.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastpref.data.messages import Messages, text_of

PartsForm = Literal["text", "either", "parts"]
_FIRST, _SECOND = "Zq0xFirstZq0x", "Zq0xSecondZq0x"
_QUESTION: Messages = [{"role": "user", "content": "Q"}]
_BEFORE: dict[str, Messages] = {
    "assistant": _QUESTION,
    "tool": [*_QUESTION, {"role": "assistant", "content": "A"}],
    "ipython": [*_QUESTION, {"role": "assistant", "content": "A"}],
}
_BEHIND: dict[str, Messages] = {"system": _QUESTION, "developer": _QUESTION}


def parts_form(write: Callable[[Messages], str], role: str) -> PartsForm:
    """Form of the content that a template reads in messages of a role.

    write: renders messages with the template.
    """

    def written(content: Any) -> str:
        messages = [
            *_BEFORE.get(role, []),
            {"role": role, "content": content},
            *_BEHIND.get(role, []),
        ]
        if isinstance(content, list):
            messages = [with_form(message, "parts") for message in messages]
        try:
            return write(messages)
        except TimeoutError:
            raise
        except Exception:  # a chat template may raise anything
            return ""

    before, first, behind = written(_FIRST).partition(_FIRST)
    if not first:
        return "parts" if _FIRST in written([_part(_FIRST)]) else "text"
    parts_before, _, rest = written([_part(_FIRST), _part(_SECOND)]).partition(_FIRST)
    between, second, parts_behind = rest.partition(_SECOND)
    reads_both = second and not between.strip()
    return "either" if reads_both and (parts_before, parts_behind) == (before, behind) else "text"


def with_form(message: dict[str, Any], form: PartsForm) -> dict[str, Any]:
    """The message with a content that the template reads."""
    content = message.get("content")
    if isinstance(content, list) and form == "text":
        return {**message, "content": text_of(content)}
    if content is not None and form == "parts":
        # Some of these templates read the first part alone.
        return {**message, "content": [_part(text_of(content))]}
    return message


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
