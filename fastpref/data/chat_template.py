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

from fastpref.data.formats import TextGroup

# CPU time limit for one group; templates usually take milliseconds.
SECONDS = 5.0


def render(group: TextGroup, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the prompt and of prompt + response for each response.

    Raises ValueError if the tokenizer has no chat template, TimeoutError after `SECONDS` (in the
    main thread only, since signals reach no other), and whatever the template raises.
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
        return [apply(group.prompt, True), *conversations]


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
