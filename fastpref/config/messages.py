"""Messages for an invalid config: one line that names the field."""

from __future__ import annotations

import difflib
import re

from pydantic import (
    ValidationError,
)

from fastpref.config.schema import section_of
from fastpref.utils.errors import UserError, shown


class ConfigError(UserError):
    """A config that cannot be run, with the path of the field at fault."""


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


def one_line(error: ValidationError) -> str:
    """`optim.lr: must be > 0, got -1`."""
    details = error.errors()
    # Of a union's alternatives pydantic reports every failure: the deepest is the useful one.
    first = max(details, key=lambda d: (d["type"] == "extra_forbidden", -details.index(d)))
    kind, got, context = first["type"], shown(first["input"]), first.get("ctx", {})
    # A union's alternatives have places of their own, such as `list[str]`.
    location = [
        str(part)
        for part in first["loc"]
        if isinstance(part, int) or part.isidentifier() or kind == "extra_forbidden"
    ]
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
        message = str(context["error"])
        option = message.split(":")[
            0
        ]  # "beta: must be …" about loss becomes "loss.beta: must be …"
        given = first["input"] if isinstance(first["input"], dict) else ("name",)
        joint = "." if option in given else ": "
        if not path or re.match(rf"{path}[:\[]", message):  # "loss[1].weight: …" says it all
            return message
        return f"{path}{joint}{message}"
    family = kind.split("_")[0]
    if family in _KINDS:
        return f"{path}: must be {_KINDS[family]}, got {got}"
    return f"{path}: {first['msg']}, got {got}"


def _nearest(location: list[str]) -> str:
    known = list(section_of(location).model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}known: {', '.join(known)}"
