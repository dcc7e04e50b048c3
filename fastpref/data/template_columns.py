"""Columns of a row that only the chat template reads: tools, and variables of its own."""

from __future__ import annotations

import json
from typing import Any

from fastpref.config.template_kwargs import check_template_kwargs
from fastpref.data.messages import check_text
from fastpref.data.readers import NOT_JSON, DataError, Record, kind_of


def template_columns(row: Record) -> dict[str, Any]:
    """Fields of a group that only the chat template reads; DataError if they have none."""
    return {
        "tools": _tools(row.get("tools")),
        "chat_template_kwargs": _template_kwargs(row.get("chat_template_kwargs")),
    }


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except NOT_JSON as error:
            raise DataError(f"tools must be a list or its JSON text: {error}") from None
    if value is None or isinstance(value, list):
        check_text("tools", value)
        return value or None
    raise DataError(f"tools must be a list, got {kind_of(value)}")


def _template_kwargs(value: Any) -> dict[str, Any] | None:
    """Variables of the chat template in a row, without nulls; DataError if they are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except NOT_JSON as error:
            raise DataError(
                f"chat_template_kwargs must be an object or its JSON text: {error}"
            ) from None
    if value is None:
        return None
    if not isinstance(value, dict):
        raise DataError(f"chat_template_kwargs must be an object, got {kind_of(value)}")
    check_text("chat_template_kwargs", value)
    try:
        check_template_kwargs(value)
    except ValueError as error:
        raise DataError(f"chat_template_kwargs: {error}") from None
    return {name: item for name, item in value.items() if item is not None} or None
