"""Render conversations as texts with a chat template.

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

from fastpref.config import Data
from fastpref.data.content_parts import PartsForm, parts_form, with_form
from fastpref.data.conversation import preference_texts, sft_texts
from fastpref.data.formats import TextGroup
from fastpref.data.messages import KNOWN_ROLES, Messages
from fastpref.data.template_source import day_of, template_of, with_date
from fastpref.utils.errors import shown

# CPU time limit for one group; templates usually take milliseconds.
SECONDS = 5.0


class ChatTemplate:
    """The chat template of a tokenizer, or the one that the config names, and its variables.

    Raises DataError if the config names no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data | None = None) -> None:
        data = data or Data(train="-")
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer, data)
        self._kwargs = data.chat_template_kwargs
        self._day = day_of(data)
        self._forms: dict[tuple[str, str], PartsForm] = {}

    def render(self, group: TextGroup) -> list[str]:
        """Texts of the prompt and of prompt + response for each response.

        The prompt ends where the responses begin, behind the header of their role. With `sft_on:
        assistant` they are followed by the texts up to each place where tokens to train on end or
        begin again, alternating.

        Raises NotScored if the conversation lacks text of the responses or begins with another
        prompt; ValueError if there is no template, or, for SFT, one that renders the messages
        before the tokens to train on in another way than the whole conversation; TimeoutError after
        `SECONDS` (in the main thread only, since signals reach no other); and whatever the template
        raises.
        """
        if isinstance(group.prompt, str):
            return [group.prompt, *(group.prompt + str(response) for response in group.responses)]
        if self._template is None and self._tokenizer.chat_template is None:
            raise ValueError("the data is conversational but the tokenizer has no chat template")
        with _time_limit(SECONDS, self._tokenizer.name_or_path):
            return self._conversations(group)

    def _conversations(self, group: TextGroup) -> list[str]:
        chosen: Any = self._tokenizer.get_chat_template(self._template, group.tools)
        template = with_date(chosen, self._day)

        def apply(messages: Messages, generation_prompt: bool) -> str:
            return self._apply(template, group, messages, generation_prompt)

        conversations: tuple[Any, ...] = (group.prompt, *group.responses)
        prompt, *responses = (
            [with_form(message, self._form(template, message["role"])) for message in messages]
            for messages in conversations
        )
        if group.sft_on is None:
            return preference_texts(apply, prompt, responses)
        return sft_texts(apply, prompt, responses[0], group.sft_on)

    def _apply(
        self, template: str, group: TextGroup, messages: Messages, generation_prompt: bool
    ) -> str:
        return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages,
            tools=group.tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **{**self._kwargs, **(group.chat_template_kwargs or {})},
        )

    def _form(self, template: str, role: str) -> PartsForm:
        """Form of the content that a template reads in messages of a role.

        Raises ValueError for a role that neither data sets nor the template know.
        """
        if (template, role) not in self._forms:
            if role not in KNOWN_ROLES and f"'{role}'" not in template.replace('"', "'"):
                raise ValueError(
                    f"the role {shown(role)} is unknown; name it user, assistant, system or tool"
                )
            alone = TextGroup([], ())
            form = parts_form(lambda m: self._apply(template, alone, m, False), role)
            self._forms[template, role] = form
        return self._forms[template, role]


def render(group: TextGroup, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of a group by the tokenizer's own template; see `ChatTemplate.render`."""
    return ChatTemplate(tokenizer).render(group)


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
