"""Rows of a streamed source, a window of an epoch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

import numpy as np

from fastpref.config import Data
from fastpref.data.formats import RowKind, TextGroup
from fastpref.data.readers import DataError
from fastpref.data.sft import read_rows_of
from fastpref.data.shards import count_rows, hub_size, sampled_hash, shards_of
from fastpref.utils import atomic_files

Row = tuple[int, list[TextGroup]]  # its number in its file, from 1, and the groups that it makes


@dataclass(frozen=True)
class Span:
    """Successive rows of a file."""

    source: str  # path, or name of a Hub data set
    first: int  # number of rows of the files before it, in the order of their names
    start: int  # rows of the file before these
    count: int


class Rows:
    """All rows of the files of a source, which are read from beginning to end.

    The form of a row's tools may depend on the rows before it in its file, so a file is never
    entered in the middle: to go back is to read it again, and files before are left out.
    """

    def __init__(self, source: str, row_kind: RowKind, data: Data) -> None:
        self._row_kind, self._data = row_kind, data
        paths = shards_of(source)
        if paths:
            self.names, sizes = [str(path) for path in paths], [*map(count_rows, paths)]
            fingerprint = sampled_hash(paths)
        else:
            size, fingerprint = hub_size(source)
            self.names, sizes = [source], [size]
        self.total = sum(sizes)
        if not self.total:
            raise DataError(f"{source}: has no rows; name files with rows")
        self.fingerprint = atomic_files.sha256(fingerprint, str(sizes))
        self._sizes = np.array(sizes)
        self._firsts = np.cumsum([0, *sizes[:-1]])
        self._open: tuple[str, int, Iterator[Row]] = ("", 0, iter(()))

    def groups_per_row(self) -> int:
        """Number of groups that the first row makes."""
        name = self.names[int(self._sizes.argmax())]
        return len(next(self._rows(name))[1])

    def window(self, seed: int, epoch: int, number: int, size: int) -> Iterator[tuple[Span, Row]]:
        """Rows [number · size, (number + 1) · size) of an epoch, whose files are shuffled."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.names))
        ends = self._sizes[order].cumsum()
        begin, end = number * size, min((number + 1) * size, self.total)
        for file, stop in zip(order, ends, strict=True):
            start = stop - self._sizes[file]
            low, high = max(begin, start), min(end, stop)
            if low < high:
                span = Span(
                    self.names[file], int(self._firsts[file]), int(low - start), int(high - low)
                )
                yield from ((span, row) for row in self._read(span))

    def _read(self, span: Span) -> Iterator[Row]:
        name, position, rows = self._open
        if name != span.source or position > span.start:
            position, rows = 0, self._rows(span.source)
        count = 0
        for row in islice(rows, span.start - position, span.start - position + span.count):
            count += 1
            yield row
        if count < span.count:
            raise DataError(
                f"{span.source}: has fewer rows than it had when the run began; restore it"
            )
        self._open = (span.source, span.start + span.count, rows)

    def _rows(self, name: str) -> Iterator[Row]:
        groups = read_rows_of(name, self._row_kind, self._data)
        for number, same_row in groupby(groups, key=itemgetter(0)):
            yield number, [group for _, group in same_row]
