"""Groups of data larger than memory: tokenized as they are needed, and kept nowhere.

An epoch is a sequence of windows of successive rows, which are tokenized together, while the window
before them is trained on. The files come in an order of their own in each epoch, and the groups of
a window are shuffled. What a window holds depends on the data, the seed and the epoch alone, and so
do the steps: a run continues at any of them, on any number of ranks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.data.dataset import UNITS, Groups, Lengths, TokenGroup, tokenizer_fingerprint
from fastpref.data.dropped import reasons
from fastpref.data.formats import RowKind, TextGroup
from fastpref.data.readers import DataError
from fastpref.data.sft import group_kind
from fastpref.data.sources import Dataset
from fastpref.data.stream_rows import Row, Rows, Span
from fastpref.data.template_source import template_fingerprint
from fastpref.data.tokenize import chunks, tokenize
from fastpref.utils import atomic_files

WINDOW = 8192  # rows, by default
_KEPT = 2  # windows that are trained on, and as many read: a message may need the one before


class Window(NamedTuple):
    """Groups of successive rows of an epoch.

    order: indices of groups into the data set in the order of training, as many as the rows make;
        those of rows without a response left are replaced by others of the window.
    """

    groups: dict[int, TokenGroup]
    order: Lengths


class _Number(int):
    """Number of a row in its file, with the index of a group that the row makes."""

    index: int

    def __new__(cls, number: int, index: int) -> _Number:
        self = super().__new__(cls, number)
        self.index = index
        return self


@dataclass(eq=False)
class GroupList:
    """Groups in memory, as a data set."""

    source: str
    kind: Any
    groups: Sequence[TokenGroup]
    fingerprint: str = ""
    mixture: None = None

    def __post_init__(self) -> None:
        counts = (len(group.responses) for group in self.groups)
        self.offsets: Lengths = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenGroup:
        return self.groups[index]

    @cached_property
    def prompt_lengths(self) -> Lengths:
        return np.array([len(group.prompt) for group in self.groups])

    @cached_property
    def response_lengths(self) -> Lengths:
        return np.array([len(r) for group in self.groups for r in group.responses])

    @cached_property
    def padded_lengths(self) -> Lengths:
        longest = np.maximum.reduceat(self.response_lengths, self.offsets[:-1])
        return self.prompt_lengths + longest

    def given_reference_logps(self) -> None:
        """None: columns with log-probs of a reference are not used."""


class StreamedGroups:
    """Data set of which two windows are in memory.

    The index of a group is its row's, over all files in the order of their names, times the number
    of groups that a row makes, plus its position in the row.

    batch_size: steps never reach over two windows, so a window has a multiple of it.

    `sample` has the groups of the first window, by which layout and memory are chosen.
    """

    mixture = None

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        row_kind: RowKind,
        batch_size: int,
        seed: int,
    ) -> None:
        self.source, self.kind = str(data.train), group_kind(row_kind)
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self.max_length = data.max_length
        self._rows = Rows(self.source, row_kind, data)
        self.per_row = self._rows.groups_per_row()
        window = data.shuffle_window or WINDOW
        self.window_rows = -(-window // batch_size) * batch_size
        excluded = {"train", "eval", "cache", "chat_template", "template_date"}
        options = data.model_dump_json(exclude=excluded)
        self.fingerprint = atomic_files.sha256(
            self._rows.fingerprint,
            tokenizer_fingerprint(tokenizer),
            template_fingerprint(tokenizer, data),
            options,
            f"{row_kind} {self.window_rows}",
        )
        self.labels = ""  # they are among the rows
        self.counts: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1, "window")  # the only one that reads rows
        self._windows: OrderedDict[tuple[int, int], Future[Window]] = OrderedDict()
        self._key: tuple[int, int] | None = None  # of the newest of these, which come first
        self._recent: deque[Window] = deque(maxlen=_KEPT)
        first = [*self._request(0, 0).result().groups.values()]
        self._first_counts = Counter(self.counts)
        self.has_preferences = self.kind == "pairwise" and any(g.labels for g in first)
        self.has_token_weights = any(g.token_weights is not None for g in first)
        # Margins count where all pairs have one.
        self.without_margin = len(self) if any(g.margin is None for g in first) else 0
        groups = [self._alike(group) for group in first]
        self.sample = GroupList(self.source, self.kind, groups, self.fingerprint)

    def __len__(self) -> int:
        """Number of groups if every row has a response left."""
        return self._rows.total * self.per_row

    @property
    def windows(self) -> int:
        """Number of windows of an epoch; the last may have fewer rows."""
        return -(-self._rows.total // self.window_rows)

    def window(self, epoch: int, number: int) -> Window:
        """A window of an epoch, and start to read the one after it."""
        if self._key != (epoch, number):
            self._recent.appendleft(self._request(epoch, number).result())
            self._key = (epoch, number)
            self._request(*((epoch, number + 1) if number + 1 < self.windows else (epoch + 1, 0)))
        return self._recent[0]

    def _request(self, epoch: int, number: int) -> Future[Window]:
        key = (epoch, number)
        if key not in self._windows:
            self._windows[key] = self._thread.submit(self._read, epoch, number)
            while len(self._windows) > _KEPT:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _read(self, epoch: int, number: int) -> Window:
        rows = self._rows.window(self._seed, epoch, number, self.window_rows)
        groups: dict[int, TokenGroup] = {}
        count = 0
        for span, same_file in groupby(rows, key=itemgetter(0)):
            numbered = [*self._numbered(span, (row for _, row in same_file))]
            count += len(numbered)
            groups |= {group.index: group for group in self._tokenized(span.source, numbered)}
        if not groups:
            raise DataError(
                f"{self.source}: none of {count:,} successive rows has a response left; raise "
                "data.max_length or look at the rows"
            )
        generator = np.random.default_rng([self._seed, epoch, number])
        return Window(groups, np.resize(generator.permutation([*groups]), count))

    def _numbered(self, span: Span, rows: Iterator[Row]) -> Iterator[tuple[_Number, TextGroup]]:
        for number, groups in rows:
            if len(groups) != self.per_row:
                raise DataError(
                    f"{span.source}, row {number}: makes {len(groups)} and the first row "
                    f"{self.per_row} {UNITS[self.kind]}s; data.streaming needs rows of one form"
                )
            for position, group in enumerate(groups):
                index = (span.first + number - 1) * self.per_row + position
                yield _Number(number, index), group

    def _tokenized(
        self, source: str, numbered: list[tuple[_Number, TextGroup]]
    ) -> Iterator[TokenGroup]:
        batches = tokenize(
            chunks(numbered, 512), source, self._tokenizer, self._data, self.kind, self.counts
        )
        for row in chain.from_iterable(batches):
            yield self._group(row)

    def _group(self, row: dict[str, Any]) -> TokenGroup:
        number, responses, weights = row["row"], tuple(row["responses"]), row["weights"]
        if weights is not None:
            weights = tuple(np.asarray(w, dtype=np.float32) for w in weights)
        labels = None if row["labels"] is None else tuple(row["labels"])
        return TokenGroup(
            number.index,
            int(number),
            row["prompt"],
            responses,
            labels,
            weights,
            mask=row["mask"],
            margin=row["margin"],
        )

    def _alike(self, group: TokenGroup) -> TokenGroup:
        """A copy of a group, with the annotations that groups of the first window have."""
        where = f"{self.source}, row {group.index // self.per_row + 1}"
        if self.kind == "pairwise" and group.labels and not self.has_preferences:
            raise DataError(
                f"{where}: has p, and no row of the first {self.window_rows:,} has; give it to one "
                "of them, or set data.soft_labels=false"
            )
        if group.token_weights and not self.has_token_weights:
            raise DataError(
                f"{where}: has token weights, and no row of the first {self.window_rows:,} has; "
                "give them to one of these, or set data.token_weights=false"
            )
        if group.labels is None and self.has_preferences:
            group = replace(group, labels=(1.0,))
        if group.token_weights is None and self.has_token_weights:
            ones = tuple(np.ones(len(r), dtype=np.float32) for r in group.responses)
            group = replace(group, token_weights=ones)
        if group.margin is None and not self.without_margin:
            raise DataError(
                f"{where}: has no margin, and all rows of the first {self.window_rows:,} have one; "
                "give it one, or remove the column"
            )
        return replace(group, margin=None if self.without_margin else group.margin)

    def __getitem__(self, index: int) -> TokenGroup:
        """A group of a window in memory; a new object each time, since a step may repeat it."""
        return self._alike(self.find(index))

    def find(self, index: int) -> TokenGroup:
        """A group of a window in memory, as it was read."""
        for window in self._recent:
            if index in window.groups:
                return window.groups[index]
        raise KeyError(index)

    @property
    def shortest(self) -> TokenGroup:
        """The group with the fewest tokens of the window that was asked for last."""
        groups = self._recent[0].groups.values()
        return min(groups, key=lambda g: (len(g.prompt) + max(map(len, g.responses)), g.index))

    def row_names(self, indices: Sequence[int]) -> list[Any]:
        """Number of each row that the groups are of, over all files, sorted."""
        return sorted({index // self.per_row + 1 for index in indices})

    def summary(self) -> str:
        """Lines with the number of rows, and with those of the first window."""
        unit, files = UNITS[self.kind], len(self._rows.names)
        read, kept = (self._first_counts[name] for name in ("found", "kept"))
        return (
            f"{self._rows.total:,} rows of {self.source}, {files:,} files, streamed; windows of "
            f"{self.window_rows:,} rows are shuffled\n"
            f"{kept:,} of the first {read:,} {unit}s remain ({reasons(self._first_counts)}); "
            "others of a window are repeated in place of dropped ones"
        )


AnyDataset = Dataset | StreamedGroups


def in_memory(dataset: AnyDataset) -> Groups:
    """The data set itself, or the sample of a streamed one."""
    return dataset.sample if isinstance(dataset, StreamedGroups) else dataset
