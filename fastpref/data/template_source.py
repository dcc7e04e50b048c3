"""The text of the chat template that a config names, and its part of the cache's key."""

from __future__ import annotations

import copy
import json
import os
import re
from datetime import date
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.config.template_kwargs import is_template, template_path
from fastpref.data.bpe import CHATML
from fastpref.data.readers import DataError
from fastpref.utils.errors import first_line

_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def template_of(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Text of the template that `data.chat_template` names; None leaves the tokenizer's.

    Raises DataError if it names no template, or a file that cannot be read.
    """
    name = data.chat_template
    if name is None:
        return None
    if is_template(name):
        return name
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in own:
        return str(own[name])
    path = template_path(name)
    if name == "chatml" and not os.path.exists(path):
        return CHATML
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        names = ", ".join(["chatml", *own])
        raise DataError(
            f"data.chat_template: {name} is no file, no template and none of the names {names}; "
            "check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template: cannot read {name}; name a text file: {first_line(error)}"
        ) from None


def with_template(tokenizer: PreTrainedTokenizerBase, data: Data) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template of the config as its own, for exports.

    Raises DataError as `template_of`, and if the template has none of the variables of the config.
    """
    template = template_of(tokenizer, data)
    if template is not None:
        own = tokenizer.chat_template
        tokenizer = copy.copy(tokenizer)
        named = isinstance(own, dict) and data.chat_template in own
        tokenizer.chat_template = {**own, "default": template} if named else template
    text = json.dumps(tokenizer.chat_template)
    for name in data.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise DataError(
                f"data.chat_template_kwargs: the chat template has no {name}; check the name, or "
                "remove it"
            )
    return tokenizer


def asks_for_the_date(template: object) -> bool:
    """Whether a template, or one of a mapping of templates, prints the current date."""
    return "strftime_now" in json.dumps(template)


def printed_day(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Date that the template prints, if it asks for the current one."""
    template = template_of(tokenizer, data) or tokenizer.chat_template
    return day_of(data).isoformat() if asks_for_the_date(template) else None


def today() -> date:
    """Current date, where the machine is."""
    return date.today()


def day_of(data: Data) -> date:
    """Date that templates print."""
    return date.fromisoformat(data.template_date) if data.template_date else today()


@lru_cache(maxsize=8)
def with_date(template: str, day: date) -> str:
    """The template with a fixed date in the place of the current one, so that no row differs."""
    return _NOW.sub(lambda match: json.dumps(day.strftime(match[2])), template)


def template_fingerprint(tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    """All that decides how a conversation is written, but the conversation: template and date."""
    template = template_of(tokenizer, data) or tokenizer.chat_template
    return json.dumps([template, printed_day(tokenizer, data)], sort_keys=True)
