"""Files of a source that is streamed: one, those of a folder, or those of a pattern."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.data.readers import DataError, hub_rows
from fastpref.utils.errors import first_line

SUFFIXES = (".parquet", ".jsonl", ".arrow")
_BLOCKS, _BLOCK = 16, 2**16  # read of each file, evenly spread, to tell whether it has changed


def shards_of(source: str) -> list[Path]:
    """Files of a source by name; none if it must be a Hub data set. DataError if they are unfit."""
    path = Path(source)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    else:
        paths = [Path(name) for name in glob.glob(source, recursive=True)]
        if not paths and source.count("/") == 1 and not set(source) & set("*?[.~"):
            return []
    unfit = [file for file in paths if file.suffix not in SUFFIXES]
    if not paths or unfit:
        what = f"{unfit[0].name} is none" if unfit else "there is none"
        raise DataError(
            f"{source}: data.streaming reads files that end in {', '.join(SUFFIXES)}, and {what}; "
            "name a file, a folder or a pattern of them"
        )
    return sorted(paths)


def count_rows(path: Path) -> int:
    """Number of rows of a file; of JSON lines, one pass over its bytes."""
    try:
        if path.suffix == ".parquet":
            return int(pq.ParquetFile(path).metadata.num_rows)
        if path.suffix == ".arrow":
            return _arrow_rows(path)
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot count its rows; write it again: {first_line(error)}"
        ) from None


def _arrow_rows(path: Path) -> int:
    with pa.memory_map(str(path)) as source:
        try:
            return int(pa.ipc.open_stream(source).read_all().num_rows)
        except pa.ArrowInvalid:
            source.seek(0)
            return int(pa.ipc.open_file(source).read_all().num_rows)


def sampled_hash(paths: list[Path]) -> str:
    """Hash of the sizes of files and of blocks of their bytes, the first and the last among them.

    The last block of a Parquet file holds sizes and statistics of all columns. A change elsewhere
    that keeps the size of a file may go unnoticed.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for k in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * k // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def hub_size(source: str) -> tuple[int, str]:
    """Number of rows of a Hub data set, and the commit of its files; DataError if unknown."""
    name, _, split = source.partition(":")
    rows = hub_rows(source, "train", streaming=True)
    size = getattr((rows.info.splits or {}).get(split or "train"), "num_examples", None)
    if not size:
        raise DataError(
            f"{source}: the Hub does not say how many rows it has, which data.streaming needs; "
            "download its files, and name their folder"
        )
    from huggingface_hub import HfApi

    return int(size), str(HfApi().dataset_info(name).sha)
