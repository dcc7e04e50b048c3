"""Conversations → the texts that are tokenised, by the chat template that a tokenizer brings.

A template is a program that came with a model. transformers runs it in jinja's sandbox, from which
it reaches neither files nor Python; the time that it may take is bounded here.
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

SECONDS = 5.0  # of processor time for one group; templates take milliseconds


def render(group: TextGroup, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompt, and prompt + response for each response, as texts.

    A chat template may raise anything; ValueError where there is none, TimeoutError after
    `SECONDS`, but for threads other than the main one, which no signal reaches.
    """
    if isinstance(group.prompt, str):
        return [group.prompt, *(group.prompt + str(response) for response in group.responses)]
    if tokenizer.chat_template is None:
        raise ValueError("the data is conversational but the tokenizer has no chat template")

    def apply(messages: list[dict[str, Any]], opening: bool) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tools=group.tools, tokenize=False, add_generation_prompt=opening
        )

    with _limited(SECONDS, f"that of {tokenizer.name_or_path}"):
        wholes = [apply([*group.prompt, *response], False) for response in group.responses]
        return [apply(group.prompt, True), *wholes]


@contextmanager
def _limited(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError within, after so much processor time; a busy machine is nobody's fault."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(
            f"{what} takes more than {seconds:g} seconds of processor time for one row; mend its "
            "loops, or name another in model.tokenizer"
        )

    usual = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, usual)
