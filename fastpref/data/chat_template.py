"""Render conversations as texts with the chat template of a tokenizer.

A template is a program that comes with a model. transformers runs it in Jinja's sandbox, which
gives access to neither files nor Python; this module limits its run time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data.formats import TextGroup, common_prefix

# CPU time limit for one group; templates usually take milliseconds.
SECONDS = 5.0


def render(group: TextGroup, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the prompt and of prompt + response for each response.

    With `sft_on: assistant` they are followed by the texts up to each place where tokens to train
    on end or begin again, alternating.

    Raises ValueError if the tokenizer has no chat template, or one that renders the messages before
    the tokens to train on in another way than the whole conversation; TimeoutError after `SECONDS`
    (in the main thread only, since signals reach no other); and whatever the template raises.
    """
    if isinstance(group.prompt, str):
        return [group.prompt, *(group.prompt + str(response) for response in group.responses)]
    if tokenizer.chat_template is None:
        raise ValueError("the data is conversational but the tokenizer has no chat template")

    def apply(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages,
            tools=group.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    with _time_limit(SECONDS, tokenizer.name_or_path):
        conversations = [apply([*group.prompt, *response], False) for response in group.responses]
        if group.sft_on == "all":
            return ["", *conversations]
        prompt = apply(group.prompt, True)
        if group.sft_on is None:
            return [prompt, *conversations]
        (conversation,) = conversations
        _check_beginning(prompt, conversation, len(group.prompt))
        boundaries = []
        for count, begins in _later_boundaries(group) if group.sft_on == "assistant" else ():
            boundary = apply([*group.prompt, *group.responses[0]][:count], begins)
            _check_beginning(boundary, conversation, count)
            boundaries.append(boundary)
        return [prompt, conversation, *boundaries]


def _later_boundaries(group: TextGroup) -> Iterator[tuple[int, bool]]:
    """Numbers of messages at which the first assistant message ends, the next begins, and so on.

    The flag says whether an assistant message begins there. The last one ends with the response.
    """
    (response,) = group.responses
    for k, message in enumerate(response):
        if k and message["role"] == "assistant":  # type: ignore[index]
            yield len(group.prompt) + k, True
        if k + 1 < len(response) and message["role"] == "assistant":  # type: ignore[index]
            yield len(group.prompt) + k + 1, False


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


@contextmanager
def _time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise TimeoutError after `seconds` of CPU time; CPU, not wall time, so that load cannot
    trip it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(
            f"the template of {name} takes more than {seconds:g} seconds of CPU time for one row; "
            "fix its loops, or set model.tokenizer"
        )

    previous_handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)
