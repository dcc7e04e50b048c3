"""Checks of the chat template that a config names, and of what it or a row passes to one."""

from __future__ import annotations

import os
from datetime import date
from typing import Any

# Arguments of transformers' `apply_chat_template`, which fastpref sets itself.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The variables themselves; ValueError if a template cannot have one of that name."""
    for name in kwargs:
        if name in _RESERVED:
            raise ValueError(f"{name} is set by fastpref; remove it")
    return kwargs


def is_template(name: str) -> bool:
    """Whether a name is a template itself."""
    return "{{" in name or "{%" in name


def template_path(name: str) -> str:
    """Path of the file that a name of a template may be; of a folder, the template of its model."""
    path = os.path.expandvars(os.path.expanduser(name))
    return os.path.join(path, "chat_template.jinja") if os.path.isdir(path) else path


def is_lost_path(name: str) -> bool:
    """Whether a name can be nothing but the path of a template, and there is none."""
    is_path = os.sep in name or name.endswith((".jinja", ".jinja2", ".j2"))
    return is_path and not is_template(name) and not os.path.exists(template_path(name))


def check_day(value: Any) -> str:
    """A date as text, YYYY-MM-DD, from a date of YAML or from text; ValueError for all else."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"must be a date such as 2026-01-31, got {value!r}") from None
