"""Rows of preference data from files or the Hub."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.data.nested import Record, Unifier, rows_of
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError, first_line

# Errors of the json module: invalid text or numbers with too many digits, and too deep nesting.
NOT_JSON = (ValueError, RecursionError)
# ValueError: text that is not UTF-8, or not JSON in a column of that type; KeyError: maps.
_NOT_A_TABLE = (pa.ArrowException, OSError, ValueError, KeyError)
_JSON_FORMATS = "expected one object per line, or a list of objects, in UTF-8"
# Rows that are looked at for the names of columns, as a row may lack any of them.
_ROWS_WITH_NAMES = 100


class DataError(UserError):
    """Data that cannot be used; the message names the file and the row."""


def read_rows(
    source: str,
    default_split: str = "train",
    columns: Mapping[str, str | None] | None = None,
    streaming: bool = False,
) -> Iterator[tuple[int, Record]]:
    """Rows of a file or of a Hub data set (`org/name` or `org/name:split`), numbered from 1.

    Messages, tools and arguments are in one form for all kinds of files, see
    `fastpref.data.nested`.

    columns: names that fastpref knows, each with the column of the source that has its values, or
        with None for a column that is left out.
    streaming: read a Hub data set while it is downloaded, and keep none of it.

    Raises DataError if the source is missing, empty or not in the format of its file extension, or
    has none of the columns.
    """
    path = _file(source)
    rows = _objects(
        source, _READERS[path.suffix](path) if path else hub_rows(source, default_split, streaming)
    )
    if columns:
        rows = _renamed(source, rows, columns)
    unifier = Unifier()
    for number, row in enumerate(rows, start=1):
        try:
            yield number, unifier.row(row)
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from None


def _objects(source: str, rows: Iterator[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: must be an object, got {kind_of(row)}")
        yield row


def _renamed(
    source: str, rows: Iterator[Record], columns: Mapping[str, str | None]
) -> Iterator[Record]:
    """Rows with renamed columns; DataError if none of the first rows has one of them."""
    first = list(islice(rows, _ROWS_WITH_NAMES))
    names = dict.fromkeys(name for row in first for name in row)
    for target, name in columns.items():
        if first and (target if name is None else name) not in names:
            raise DataError(
                f"data.columns.{target}: {source} has no column {name or target}; use one of "
                f"{', '.join(map(str, names)) or 'none'}"
            )
    for row in chain(first, rows):
        yield rename(row, columns)


def rename(row: Record, columns: Mapping[str, str | None]) -> Record:
    """The row with the columns under the names that fastpref knows.

    A column of the row that has such a name already gives way to it.
    """
    renamed = {target: row[name] for target, name in columns.items() if name in row}
    rest = {
        name: value
        for name, value in row.items()
        if name not in columns and name not in columns.values()
    }
    return {**renamed, **rest}


def _file(source: str) -> Path | None:
    """Path of a source if it is a file, None if it must be a Hub data set."""
    # Path.expanduser raises for an unknown user, os.path.expanduser does not.
    path = Path(os.path.expanduser(source))
    if not path.exists():
        return None
    if path.is_dir():
        raise DataError(f"{source}: is a folder; name a JSON, JSONL, Parquet or Arrow file")
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty; name one with rows")
    if path.suffix not in _READERS:
        raise DataError(f"{source}: unknown file extension; expected {', '.join(_READERS)}")
    return path


def _json_rows(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    try:
        yield from json.loads(path.read_text(encoding="utf-8-sig"))
    except NOT_JSON as error:
        raise DataError(f"{path}: not valid JSON; {_JSON_FORMATS}: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except NOT_JSON as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON; {_JSON_FORMATS}: {error}"
                ) from None


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from rows_of(batch)
    except _NOT_A_TABLE as error:
        raise DataError(
            f"{path}: not a readable Parquet file; write it again: {first_line(error)}"
        ) from None


def _arrow_rows(path: Path) -> Iterator[Record]:
    with pa.memory_map(str(path)) as source:
        try:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
            # Without validation, a damaged file can be read out of bounds.
            table.validate(full=True)
            for batch in table.to_batches(max_chunksize=1024):
                yield from rows_of(batch)
        except _NOT_A_TABLE as error:
            raise DataError(
                f"{path}: not a readable Arrow file; write it again: {first_line(error)}"
            ) from None


_READERS = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def hub_rows(source: str, default_split: str, streaming: bool = False) -> Any:
    """A data set of the Hub, of `datasets`; DataError if it cannot be loaded."""
    name, _, split = source.partition(":")
    if source.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in _READERS:
        raise DataError(f"{source}: no such file; check the path")
    import datasets

    try:
        return datasets.load_dataset(name, split=split or default_split, streaming=streaming)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(
            f"{source}: no such file, and loading it from the Hub failed{offline}; check the name: "
            f"{first_line(error)}"
        ) from None


def content_hash(source: str, default_split: str = "train") -> str:
    """Hash of a file's bytes, or the fingerprint of a Hub data set's rows."""
    path = _file(source)
    if path is not None:
        return atomic_files.file_sha256(path)
    return str(hub_rows(source, default_split)._fingerprint)


def kind_of(value: Any) -> str:
    """Name of a JSON value's type for messages."""
    return {"str": "text", "list": "a list", "dict": "an object", "NoneType": "null"}.get(
        type(value).__name__, type(value).__name__
    )
