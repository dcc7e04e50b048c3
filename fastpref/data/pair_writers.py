"""Write rows of preference data as JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.data.readers import Record
from fastpref.utils.errors import UserError, first_line

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_BATCH = 1024  # rows
_AS_JSON = ("tools", "chat_template_kwargs")


class RowWriter(Protocol):
    """Context manager that takes rows as JSON lines and completes the file at its end."""

    def add(self, line: bytes) -> None:
        """Write one row, a JSON object that ends in a line break."""

    def __enter__(self) -> RowWriter: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def add(self, line: bytes) -> None:
        self._file.write(line)

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Parquet:
    """Rows of one schema, that of the first; what chat templates read is written as JSON text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Record] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, line: bytes) -> None:
        row = json.loads(line)
        for name in _AS_JSON:
            if row.get(name) is not None:
                row[name] = json.dumps(row[name], ensure_ascii=False)
        self._rows.append(row)
        if len(self._rows) == _BATCH:
            self._flush()

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, _schema(self._rows[0]))
        schema = self._writer.schema
        for row in self._rows:
            _check(row)
        try:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=schema))
        except (pa.ArrowException, TypeError) as error:
            raise UserError(
                "--out: the rows differ in more than Parquet can hold; write a .jsonl file: "
                f"{first_line(error)}"
            ) from None
        self._rows = []


WRITERS: dict[str, Callable[[Path], RowWriter]] = {".jsonl": _JsonLines, ".parquet": _Parquet}


def _schema(row: Record) -> pa.Schema:
    types = {
        "scores": pa.list_(pa.float64()),
        "score_chosen": pa.float64(),
        "score_rejected": pa.float64(),
        "label": pa.bool_(),
    }
    fields = {name: types.get(name) or _type(value) for name, value in row.items()}
    return pa.schema({**fields, **dict.fromkeys(_AS_JSON, pa.string())})


def _type(value: Any) -> pa.DataType:
    """Type of text, of messages, or of a list of either."""
    if isinstance(value, str):
        return pa.string()
    return _MESSAGES if isinstance(value[0], dict) else pa.list_(_type(value[0]))


def _check(row: Record) -> None:
    """Raise UserError for messages with keys that the schema would drop."""
    values = [row[name] for name in ("prompt", "chosen", "rejected", "completion") if name in row]
    for messages in [*values, *row.get("completions", [])]:
        for message in messages if isinstance(messages, list) else []:
            other = message.keys() - {"role", "content"}
            if other:
                raise UserError(
                    f"--out: messages with {', '.join(sorted(other))} do not fit into Parquet; "
                    "write a .jsonl file"
                )
