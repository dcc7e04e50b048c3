"""Texts of a conversation up to the places where its responses begin and end.

The text behind a prompt begins with what the template writes before an answer, such as a header of
its role. It belongs to the prompt, whether or not the template writes it with a generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property

from fastpref.data.formats import SftOn, common_prefix
from fastpref.data.messages import Messages, text_of
from fastpref.data.scored_text import find, has_short, probes, scored_texts

# Words for the role of an answer in headers.
_ROLE = re.compile(r"(?i)\b(ai|assistant|bot|chatbot|gpt|model)\b")
# Renders messages; with True, up to where an answer begins.
Apply = Callable[[Messages, bool], str]
_ANSWER: Messages = [{"role": "assistant", "content": "An answer to it."}]


class NotScored(Exception):
    """A conversation in which the tokens to train on are not those of the responses."""


class LostText(NotScored):
    """The template leaves out text of a response, or of the question before it."""


class OtherPrompt(NotScored):
    """The template writes the prompt in another way when a response follows."""


class _Prompt:
    """The messages before a response, as a template writes them."""

    def __init__(self, apply: Apply, messages: Messages) -> None:
        self.apply, self.messages = apply, messages
        self.opening = apply(messages, True)

    @cached_property
    def plain(self) -> str:
        """Text without a generation prompt."""
        return self.apply(self.messages, False)


def preference_texts(apply: Apply, prompt: Messages, responses: list[Messages]) -> list[str]:
    """Texts of the prompt, up to where the responses begin, and of prompt + response for each."""
    before = _Prompt(apply, prompt)
    if not responses:
        return [_opening_alone(before)]
    conversations = [apply([*prompt, *response], False) for response in responses]
    starts = [
        _start(before, response, conversation)
        for response, conversation in zip(responses, conversations, strict=True)
    ]
    beginning = conversations[0][: min(starts)]
    if not all(conversation.startswith(beginning) for conversation in conversations):
        beginning = beginning[: common_prefix(*conversations)]
    _check_question(prompt, beginning)
    return [beginning, *conversations]


def sft_texts(apply: Apply, prompt: Messages, response: Messages, sft_on: SftOn) -> list[str]:
    """Texts of the prompt and of the conversation, and with `sft_on: assistant` those after it.

    The texts after it end where the first assistant message ends, the next begins, and so on,
    without the end of the conversation.
    """
    messages = [*prompt, *response]
    conversation = apply(messages, False)
    if sft_on == "all":
        if find(scored_texts(messages), conversation, 0) is None:
            raise LostText
        return ["", conversation]
    boundaries = []
    for count, end in _spans(len(prompt), messages, sft_on):
        before = _Prompt(apply, messages[:count])
        _check_beginning(before.opening, conversation, count)
        start = _start(before, messages[count:end], conversation)
        boundaries.append(conversation[:start])
        if end < len(messages):
            boundary = apply(messages[:end], False)
            _check_beginning(boundary, conversation, end)
            boundaries.append(boundary)
    beginning, *others = boundaries
    _check_question(prompt, beginning)
    return [beginning, conversation, *others]


def loses_reasoning(response: Messages, conversation: str) -> bool:
    """Whether a conversation lacks the reasoning of its last message."""
    return find(scored_texts(response[-1:], with_reasoning=True), conversation, 0) is None


def loses_system(prompt: Messages, beginning: str) -> bool:
    """Whether the text of a prompt lacks one of its system messages."""
    texts = (text_of(m.get("content")) for m in prompt if m["role"] in ("system", "developer"))
    return any(find([text], beginning, 0) is None for text in texts if text.strip())


def _spans(first: int, messages: Messages, sft_on: SftOn) -> Iterator[tuple[int, int]]:
    """Numbers of messages before and up to the end of each run of messages to train on."""
    if sft_on == "completion":
        yield first, len(messages)
        return
    for k in range(first, len(messages)):
        if messages[k]["role"] == "assistant":
            yield k, k + 1


def _opening_alone(before: _Prompt) -> str:
    """Text of a prompt up to an answer, with a header that the template writes only before one."""
    if before.messages[-1]["role"] == "assistant" or before.plain != before.opening:
        return before.opening
    return preference_texts(before.apply, before.messages, [_ANSWER])[0]


def _start(before: _Prompt, response: Messages, conversation: str) -> int:
    """Number of characters of a conversation before those of the response are scored.

    Raises LostText or OtherPrompt.
    """
    opening, whole = before.opening, conversation
    if has_short(response):
        response = probes(response)
        conversation = before.apply([*before.messages, *response], False)
    shared = common_prefix(opening, conversation)
    is_prefix = shared >= len(opening.rstrip())
    at = _find(response, conversation, shared)
    if is_prefix and at is not None and not conversation[shared:at].strip():
        return shared
    prompt_end = common_prefix(before.plain, opening)  # without a generation prompt
    if shared < prompt_end:
        raise OtherPrompt
    if at is None:
        # A generation prompt may end with the first characters of the response.
        at = _find(response, conversation, prompt_end)
        if at is None:
            raise LostText
        shared = shared if is_prefix else min(shared, at)
    elif before.plain == opening or not (
        is_prefix or _ROLE.search(conversation[shared:at]) is None
    ):
        shared = at  # behind a header that is in no generation prompt
    return min(shared, common_prefix(conversation, whole))


def _find(response: Messages, conversation: str, start: int) -> int | None:
    """Position of the text of a response, or of its reasoning if the conversation has that, too."""
    at = find(scored_texts(response, with_reasoning=True), conversation, start)
    return find(scored_texts(response), conversation, start) if at is None else at


def _check_question(prompt: Messages, beginning: str) -> None:
    """Raise LostText unless the text of a prompt has its last message of a user."""
    if prompt and prompt[-1]["role"] == "user":
        text = text_of(prompt[-1].get("content"))
        if text.strip() and find([text], beginning, 0) is None:
            raise LostText


def _check_beginning(text: str, conversation: str, count: int) -> None:
    """Raise ValueError unless the conversation begins with the text of its first messages."""
    if conversation.startswith(text):
        return
    at = common_prefix(text, conversation)
    raise ValueError(
        f"the whole conversation does not begin with the text of its first {count} messages "
        f"({conversation[at : at + 20]!r} instead of {text[at : at + 20]!r}), so the tokens to "
        "train on are not known"
    )
