"""Messages for an invalid config: one line that names the field."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

from fastpref.config.schema import Config, inner_section, section_of
from fastpref.utils.errors import shown

_COMPARISONS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "model": "a mapping",
    "list": "a list",
    "tuple": "a list",
}


def one_line(error: ValidationError, section: str = "") -> str:
    """Return the message of the first invalid field: `optim.lr: must be > 0, got -1`.

    section: the name of the section that was validated alone; empty for a whole config.
    """
    details = error.errors()
    # Pydantic reports every alternative of a union; an unknown key is the useful failure.
    first = max(details, key=lambda d: (d["type"] == "extra_forbidden", -details.index(d)))
    kind, got, context = first["type"], shown(first["input"]), first.get("ctx", {})
    # The location includes names of a union's alternatives, such as `list[str]`.
    location = [section] if section else []
    *outer, last = first["loc"] or ("",)
    location += [str(part) for part in outer if isinstance(part, int) or part.isidentifier()]
    if isinstance(last, int) or last.isidentifier() or kind == "extra_forbidden":
        location.append(str(last))
    path = ".".join(location)
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {_nearest(location)}"
    if kind == "missing":
        return f"{path}: is missing; set it"
    if kind in _COMPARISONS:
        sign, key = _COMPARISONS[kind]
        return f"{path}: must be {sign} {context[key]:g}, got {got}"
    if kind == "literal_error":
        return f"{path}: must be {context['expected']}, got {got}"
    if kind == "value_error":
        return _joined(path, str(context["error"]), first["input"])
    family = kind.split("_")[0]
    if family == "string" and isinstance(first["input"], int | float):
        return f"{path}: must be text, got {got}; write it in quotes"
    if family in _KINDS:
        return f"{path}: must be {_KINDS[family]}, got {got}"
    return f"{path}: {first['msg']}, got {got}"


def _joined(path: str, message: str, value: Any) -> str:
    """Return the message of a validator behind the path of the value that it refused.

    "beta: must be …" about loss becomes "loss.beta: must be …"; "loss[1].weight: …" about loss,
    and any message about the whole config, has its path already.
    """
    if not path or re.match(rf"{path}[:\[]", message):
        return message
    fields = value if isinstance(value, dict) else ("name",)
    begins_with_field = message.split(":")[0] in fields
    return f"{path}.{message}" if begins_with_field else f"{path}: {message}"


def _nearest(location: list[str]) -> str:
    """Return the keys of the section, behind the one that was probably meant."""
    key = location[-1]
    names = list(section_of(location).model_fields)
    matches = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not matches:
        sections = {name: inner_section(field) for name, field in Config.model_fields.items()}
        elsewhere = [
            f"{n}.{key}" for n, inner in sections.items() if inner and key in inner.model_fields
        ]
        matches = elsewhere if len(elsewhere) == 1 else []
    guess = f"did you mean {matches[0]}? " if matches else ""
    return f"{guess}known: {', '.join(names)}"
