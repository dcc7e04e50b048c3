"""Result files as JSON that a person and a diff can read: one row a line."""

from __future__ import annotations

import json
from typing import Any

_LINE = 1500  # characters; a longer list or mapping takes a line for each item
_DIGITS = 6  # significant ones; more are noise in every measurement


def dumps(document: Any) -> str:
    """Return JSON with short lists and mappings on one line, and floats of six digits."""
    return _text(_rounded(document), "") + "\n"


def _text(value: Any, indent: str) -> str:
    line = json.dumps(value, ensure_ascii=False)
    is_container = isinstance(value, dict | list)
    # The outermost level is always spread: it names the benchmark, the device and the commit.
    if not value or not is_container or (indent and len(line) <= _LINE):
        return line
    deeper = indent + " "
    if isinstance(value, dict):
        items = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {_text(item, deeper)}"
            for key, item in value.items()
        ]
    else:
        items = [_text(item, deeper) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}{closing}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
