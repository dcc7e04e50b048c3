"""Text of a question to a chat model, and the verdict in its answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fastpref.utils.errors import UserError

PLACEHOLDERS = ("{prompt}", "{answer_a}", "{answer_b}")
DEFAULT = """\
Two assistants, A and B, replied to the same user. Say which reply serves the user better.

First check what each reply claims: a wrong or invented statement weighs more than a missing detail.
Then check whether the reply does what was asked, in the form that was asked for. Then check how
easy it is to use. Being longer, being more polite, or being shown first is no advantage.

<prompt>
{prompt}
</prompt>

<reply_a>
{answer_a}
</reply_a>

<reply_b>
{answer_b}
</reply_b>

Give your reasons in a few sentences. Then end with one line that holds only your verdict:
[[A]] for reply A, [[B]] for reply B, or [[C]] if neither is better.
"""
# Labels that count as a verdict, and the label of Arena-Hard with the same meaning.
LABELS = {
    "A": "A>B",
    "B": "B>A",
    "C": "A=B",
    "TIE": "A=B",
    "A=B": "A=B",
    "B=A": "A=B",
    "A>B": "A>B",
    "A>>B": "A>>B",
    "B>A": "B>A",
    "B>>A": "B>>A",
}
# Preference for the reply that is shown as A.
PREFERENCES = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
_LABEL = re.compile(r"\[\[(" + "|".join(sorted(LABELS, key=len, reverse=True)) + r")\]\]")
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_ANY_PLACEHOLDER = re.compile(r"\{[a-zA-Z_]\w*\}")
_REASONING_END = "</think>"


class Reply(NamedTuple):
    """An answer of a chat model."""

    text: str
    finish_reason: str | None


def read_template(path: Path | None, option: str = "--template") -> str:
    """Template of a question: a file with all of PLACEHOLDERS; None is the default template.

    option: that names the file, for messages.

    Raises UserError if the file cannot be read, lacks a placeholder or has another one.
    """
    if path is None:
        return DEFAULT
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path} ({error}); name a text file") from None
    for placeholder in PLACEHOLDERS:
        if placeholder not in template:
            raise UserError(
                f"{option}: {path} has no {placeholder}; add {' and '.join(PLACEHOLDERS)}"
            )
    for placeholder in _ANY_PLACEHOLDER.findall(template):
        if placeholder not in PLACEHOLDERS:
            raise UserError(
                f"{option}: {path} has the unknown placeholder {placeholder}; remove it, known "
                f"are {', '.join(PLACEHOLDERS)}"
            )
    return template


def fill(template: str, prompt: str, first: str, second: str) -> str:
    """Question about two replies; placeholders inside of prompt and replies stay as they are."""
    values = dict(zip(PLACEHOLDERS, (prompt, first, second), strict=True))
    return _PLACEHOLDER.sub(lambda match: values[match[0]], template)


def verdict(reply: Reply) -> str | None:
    """Arena-Hard label of a reply's verdict, such as "A>B"; None if it has no clear one.

    All labels in the text must agree. Text before `</think>` does not count, and neither does a
    text that was cut at the token limit.
    """
    if reply.finish_reason == "length":
        return None
    _, end, rest = reply.text.rpartition(_REASONING_END)
    if not end and rest.lstrip().startswith("<think>"):
        return None
    labels = {LABELS[label] for label in _LABEL.findall(rest)}
    return labels.pop() if len(labels) == 1 else None
