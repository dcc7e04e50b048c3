"""Say why groups were dropped, from the counts of tokenization."""

from __future__ import annotations

from collections.abc import Mapping

# Counts of groups that a chat template spoils; the first row of each is `NAME_row`.
_SPOILT = {
    "lost_text": "the chat template leaves out their text",
    "other_prompt": "the chat template changes the prompt when a response follows",
}


def reasons(counts: Mapping[str, int]) -> str:
    """Numbers of dropped groups by reason."""
    parts = [f"no completion left: {counts['no_completion']:,}"]
    for name, reason in _SPOILT.items():
        if count := counts.get(name, 0):
            parts.append(f"{reason}: {count:,}, the first in row {counts[f'{name}_row']:,}")
    return "; ".join(parts)


def losses(counts: Mapping[str, int]) -> list[str]:
    """Numbers of groups that are trained on without something that the template leaves out."""
    return [
        f"the chat template leaves out the {words} of {counts[f'lost_{part}']:,}, the first in row "
        f"{counts[f'lost_{part}_row']:,}"
        for part, words in (("system", "system message"), ("reasoning", "reasoning"))
        if counts.get(f"lost_{part}")
    ]


def remedy(counts: Mapping[str, int]) -> str:
    """Advice for a source of which no group is left."""
    if any(counts.get(name) for name in _SPOILT):
        return "use another template in data.chat_template, or look at the rows"
    if counts["no_completion"] > counts.get("no_text", 0):
        return "raise data.max_length or look at the rows"
    return "give the rows text" if counts["no_completion"] else "give it rows"


def reason(counts: Mapping[str, int]) -> str:
    """Reason for which the only group that was counted is dropped."""
    for name, words in _SPOILT.items():
        if counts.get(name):
            return words
    if counts.get("no_text"):
        return "a response has no text"
    return "no token of a response that is trained on is left within max_length"
