"""Read preference data from files or the Hub, in the formats that people keep it in.

A row becomes a `TextPair`: what the model is shown, and two full texts that continue it.

| format | columns |
|---|---|
| paired | `prompt`, `chosen`, `rejected` |
| implicit prompt | `chosen`, `rejected`; the prompt is what they begin with in common |
| conversational | the same columns as lists of `{"role", "content"}`; optional `tools` |

Optional columns: `p`, the probability that `chosen` is preferred, and `ref_chosen_logps`,
`ref_rejected_logps`, summed reference log-probs in nats. Other columns are left alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref import files
from fastpref.errors import UserError, first_line

FORMATS = (
    "prompt, chosen, rejected | chosen, rejected (prompt implicit); "
    "each plain text or a list of {role, content} messages"
)
Row = dict[str, Any]
Messages = list[dict[str, Any]]


class DataError(UserError):
    """Data that cannot be trained on, with the file and the row."""


class TextPair(NamedTuple):
    prompt: str | Messages
    chosen: str | Messages  # the response alone
    rejected: str | Messages
    tools: list[Any] | None
    preference: float | None
    reference_logps: tuple[float, float] | None  # summed, (chosen, rejected)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def read_rows(source: str, default_split: str = "train") -> Iterator[tuple[int, Row]]:
    """Rows of a file or of a Hub dataset (`org/name` or `org/name:split`), numbered from 1.

    Raises DataError when the source is missing, empty or not what its name says.
    """
    path = Path(source).expanduser()
    if not path.exists():
        rows = _hub_rows(source, default_split)
    elif path.is_dir():
        raise DataError(f"{source}: is a folder; name a JSON, JSONL, Parquet or Arrow file")
    elif path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty")
    elif path.suffix in _READERS:
        rows = _READERS[path.suffix](path)
    else:
        raise DataError(f"{source}: unknown ending; expected {', '.join(_READERS)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: must be an object, got {_kind(row)}")
        yield number, row


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    try:
        yield from json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def _arrow_rows(path: Path) -> Iterator[Row]:
    with pa.memory_map(str(path)) as source:
        try:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a readable Arrow file: {first_line(error)}") from None
        for batch in table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


_READERS = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _hub_rows(source: str, default_split: str) -> Any:
    name, _, split = source.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in _READERS:
        raise DataError(f"{source}: no such file")
    import datasets

    try:
        return datasets.load_dataset(name, split=split or default_split)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(
            f"{source}: no such file, and loading it from the Hub failed{offline}: "
            f"{first_line(error)}"
        ) from None


def content_hash(source: str, default_split: str = "train") -> str:
    """Hash of a file's bytes, or the fingerprint of a Hub data set's rows."""
    path = Path(source).expanduser()
    if path.is_file():
        return files.file_sha256(path)
    return str(_hub_rows(source, default_split)._fingerprint)


def read_pairs(source: str, default_split: str = "train") -> Iterator[tuple[int, TextPair]]:
    """Rows as text pairs; raises DataError for the first row that is none."""
    for number, row in read_rows(source, default_split):
        try:
            yield number, to_pair(row)
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None


def to_pair(row: Row) -> TextPair:
    """One row of any accepted format; DataError says what is wrong with it."""
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise DataError(
            f"no {' and no '.join(missing)}; columns found: {', '.join(map(str, row)) or 'none'}; "
            f"formats accepted: {FORMATS}"
        )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            _check_text(name, text)
        if prompt is None:
            prompt, chosen, rejected = _split_text(chosen, rejected)
        elif not isinstance(prompt, str):
            raise DataError("prompt is a list of messages but chosen and rejected are text")
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    else:
        raise DataError(
            "chosen and rejected must both be text or both be lists of messages, "
            f"got {_kind(chosen)} and {_kind(rejected)}"
        )
    return TextPair(
        prompt, chosen, rejected, _tools(row.get("tools")), _preference(row), _reference(row)
    )


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off the implicit prompt of two transcripts.

    `Human:`/`Assistant:` transcripts are cut after the last `Assistant:` they share; other text at
    the last white space they share, so that no word is split.
    """
    prompt = chosen[: common_prefix(chosen, rejected)]
    marker = "\n\nAssistant:"
    position = prompt.rfind(marker)
    if position >= 0:
        prompt = prompt[: position + len(marker)]
    elif len(prompt) < max(len(chosen), len(rejected)):
        prompt = prompt[: max(0, *(prompt.rfind(space) for space in " \n\t"))]
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _split_messages(
    prompt: Any, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Bring conversations to (prompt messages, chosen messages, rejected messages)."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_messages(name, messages)
    if prompt is None:
        shared = common_prefix(chosen, rejected)
        if shared == min(len(chosen), len(rejected)):
            shared -= 1  # one conversation continues the other, or they are equal
        prompt = chosen[:shared]
    else:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        _check_messages("prompt", prompt)
        # Some data sets repeat the prompt at the start of both conversations.
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            shared = len(prompt)
        else:
            shared = 0
    chosen, rejected = chosen[shared:], rejected[shared:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[0].get("role") in ("system", "user"):
            raise DataError(f"{name} must go on from the prompt with an assistant message")
    return prompt, chosen, rejected


def _check_messages(name: str, messages: Any) -> None:
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{name} must be a list of {{role, content}} messages")
        _check_text(name, message.get("content"))


def _check_text(name: str, text: Any) -> None:
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not valid Unicode at character {error.start}") from None


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"tools must be a list or its JSON text: {error}") from None
    if value is None or isinstance(value, list):
        return value or None
    raise DataError(f"tools must be a list, got {_kind(value)}")


def _preference(row: Row) -> float | None:
    value = row.get("p")
    if value is None:
        return None
    if not _is_number(value) or not 0 <= value <= 1:
        raise DataError(f"p must be a probability in [0, 1], got {value!r}")
    return float(value)


def _reference(row: Row) -> tuple[float, float] | None:
    values = [row.get(name) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    if values == [None, None]:
        return None
    chosen, rejected = values
    if not (_is_number(chosen) and _is_number(rejected)):
        raise DataError(
            f"ref_chosen_logps and ref_rejected_logps must both be numbers, got {values}"
        )
    return float(chosen), float(rejected)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    return {"str": "text", "list": "a list", "dict": "an object", "NoneType": "null"}.get(
        type(value).__name__, type(value).__name__
    )


def common_prefix(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest = min(map(len, (first, *others)))
    if all(other[:shortest] == first[:shortest] for other in others):  # the usual case, fast
        return shortest
    columns = zip(first, *others, strict=False)
    return sum(1 for _ in takewhile(lambda column: all(x == column[0] for x in column), columns))
