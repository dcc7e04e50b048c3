"""Messages, tools and arguments of calls in one form, whatever file their rows are from.

A table gives all objects at one place the same keys in the same order: those that a row lacks are
null, in the order of their first appearance, and whole numbers beside others are floats. What a
row had before cannot be told from it, so rows of every file, JSON included, take one form:

- An object has no key whose value is null. Nulls in lists, such as `enum: [null]`, stay.
- Keys come in the order of their first appearance at their place in the file.
- A float that is a whole number is an int.

Text that holds JSON, as `tools` or `arguments` may, is left as it is.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa

Record = dict[str, Any]
Decoder = Callable[[Any], Any]
# Columns whose values a chat template may print.
_COLUMNS = frozenset(
    {
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "completions",
        "messages",
        "conversations",
        "tools",
        "chat_template_kwargs",
    }
)
_LARGEST = 2.0**53  # up to which all whole numbers are floats
_NOT_JSON = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)


class _Keys(dict[str, "_Keys"]):
    """Keys of the objects at one place, in the order of their first appearance."""

    rank: int = 0  # among the keys of the objects around

    def at(self, key: str) -> _Keys:
        """Keys of the objects that the key has as its value or in it."""
        keys = self.get(key)
        if keys is None:
            keys = self[key] = _Keys()
            keys.rank = len(self)
        return keys


class Unifier:
    """Brings the rows of one file into one form, in the order of the file."""

    def __init__(self) -> None:
        self._keys = _Keys()

    def row(self, row: Record) -> Record:
        """The row with its messages, tools and arguments in the form above.

        Raises ValueError for a date or a decimal number, whose text is no longer known, and for
        values in more lists and objects than Python can follow.
        """
        changes: Record = {}
        for name, value in row.items():
            if name in _COLUMNS and isinstance(value, list | dict):
                try:
                    changes[name] = _unified(name, value, self._keys.at(name))
                except RecursionError:
                    raise ValueError(f"{name} is nested too deeply; store it as text") from None
        return {**row, **changes} if changes else row


def _unified(column: str, value: Any, keys: _Keys) -> Any:
    if isinstance(value, dict):
        return value if _is_plain(value, keys) else _object(column, value, keys)
    if isinstance(value, list):
        return [_unified(column, item, keys) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST:
        return int(value)
    if isinstance(value, _NOT_JSON):
        raise ValueError(
            f"{column} has a value of type {type(value).__name__}, and how it was written is not "
            "known; store it as text"
        )
    return value


def _object(column: str, value: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    places = [(keys.at(key), key) for key in value]  # of null values, too
    if any(a.rank > b.rank for (a, _), (b, _) in pairwise(places)):
        places.sort(key=lambda place: place[0].rank)
    return {
        key: _unified(column, value[key], inner) for inner, key in places if value[key] is not None
    }


def _is_plain(value: dict[str, Any], keys: _Keys) -> bool:
    """Whether an object, as most messages, holds only text in the order of the keys."""
    last = 0
    for key, item in value.items():
        inner = keys.get(key)
        if inner is None or inner.rank < last or type(item) is not str:
            return False
        last = inner.rank
    return True


def rows_of(batch: pa.RecordBatch) -> Iterator[Record]:
    """Yield the rows of a table, with values of Arrow's JSON type parsed and maps as objects.

    Raises ValueError or KeyError for values that are no JSON, or maps with a key twice.
    """
    decoders = {field.name: _decoder(field.type) for field in batch.schema}
    changed = {name: decode for name, decode in decoders.items() if decode is not None}
    for row in batch.to_pylist(maps_as_pydicts="strict"):
        for name, decode in changed.items():
            row[name] = decode(row[name])
        yield row


def _decoder(kind: pa.DataType) -> Decoder | None:
    """Function that parses the JSON texts in a value of a type; None if it has none."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _or_none(json.loads)
    if pa.types.is_struct(kind):
        decoders = {field.name: _decoder(field.type) for field in kind}
        inner = {name: decode for name, decode in decoders.items() if decode is not None}
        return _or_none(partial(_decoded, inner)) if inner else None
    if pa.types.is_map(kind):
        decode = _decoder(kind.item_type)
        return None if decode is None else _or_none(partial(_values, decode))
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):  # lists of all sizes
        decode = _decoder(kind.value_type)
        return None if decode is None else _or_none(partial(_items, decode))
    return None


def _or_none(decode: Decoder) -> Decoder:
    return lambda value: None if value is None else decode(value)


def _items(decode: Decoder, value: list[Any]) -> list[Any]:
    return [decode(item) for item in value]


def _values(decode: Decoder, value: dict[str, Any]) -> dict[str, Any]:
    return {key: decode(item) for key, item in value.items()}


def _decoded(decoders: dict[str, Decoder], value: dict[str, Any]) -> dict[str, Any]:
    return {key: decoders[key](item) if key in decoders else item for key, item in value.items()}
