"""The data sets of a run: one source, or several that are read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.config.data_section import DataField
from fastpref.data.dataset import UNITS, GroupDataset, Lengths, TokenGroup, load_groups
from fastpref.data.formats import RowKind
from fastpref.data.mixture import Mixture
from fastpref.data.readers import DataError
from fastpref.utils import atomic_files

SPLITS: dict[DataField, str] = {"train": "train", "eval": "test"}


class GroupMixture:
    """Groups of several data sets as one: all of the first, then all of the second, and so on.

    An index counts over all of them; the number of a row is that of its own source.

    held_out: read whole and in order, so that there are no epochs.
    """

    def __init__(
        self, parts: Sequence[GroupDataset], mixture: Mixture, held_out: bool = False
    ) -> None:
        self.parts, self.mixture = parts, mixture
        self.kind = parts[0].kind
        self._of_an_epoch = [] if held_out else mixture.summary(UNITS[self.kind])
        self.source = ", ".join(part.source for part in parts)
        self.fingerprint = atomic_files.sha256("mixture", *(part.fingerprint for part in parts))
        # Whatever decides the order of the groups, as a resumed run needs the same.
        self.labels = atomic_files.sha256(
            *(part.labels for part in parts), str(mixture.sizes), str(mixture.counts)
        )
        self._first = np.cumsum([0, *(len(part) for part in parts)])
        self.prompt_lengths: Lengths = np.concatenate([part.prompt_lengths for part in parts])
        self.response_lengths: Lengths = np.concatenate([part.response_lengths for part in parts])
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        self.offsets: Lengths = np.concatenate([[0], sizes.cumsum()])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> TokenGroup:
        part, position = self._locate(index)
        group = self.parts[part][position]
        if group.labels is None and self.has_preferences:
            group = replace(group, labels=(1.0,))  # as in a file of which some rows have p
        if group.token_weights is None and self.has_token_weights:
            ones = tuple(np.ones(len(r), dtype=np.float32) for r in group.responses)
            group = replace(group, token_weights=ones)
        margin = None if self.without_margin else group.margin
        return replace(group, index=index, first=int(self.offsets[index]), margin=margin)

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the data set of a group, and the group's index in it."""
        part = int(self.mixture.sources_of([index])[0])
        return part, int(index - self._first[part])

    @cached_property
    def padded_lengths(self) -> Lengths:
        return np.concatenate([part.padded_lengths for part in self.parts])

    @cached_property
    def has_preferences(self) -> bool:
        """Whether any pair has a soft label."""
        return any(part.has_preferences for part in self.parts)

    @cached_property
    def has_token_weights(self) -> bool:
        """Whether any pair has token weights."""
        return any(part.has_token_weights for part in self.parts)

    @cached_property
    def without_margin(self) -> int:
        """Number of pairs without a margin."""
        return sum(part.without_margin for part in self.parts)

    def label_values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Labels of all groups, concatenated."""
        return np.concatenate([part.label_values() for part in self.parts])

    def margin_values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Margins of all pairs, in which all have one."""
        return np.concatenate([part.margin_values() for part in self.parts])

    def prompt_bytes(self) -> Iterator[bytes]:
        """Token ids of each prompt as bytes, for comparing prompts."""
        for part in self.parts:
            yield from part.prompt_bytes()

    def given_reference_logps(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Reference log-probs of all responses from the data's columns, or None.

        Raises DataError if only some sources have them, and as `GroupDataset` does.
        """
        columns = [part.given_reference_logps() for part in self.parts]
        present = [column for column in columns if column is not None]
        if not present:
            return None
        for part, column in zip(self.parts, columns, strict=True):
            if column is None:
                raise DataError(
                    f"{part.source}: has no ref_chosen_logps and ref_rejected_logps, which other "
                    "sources of the mixture have; add the columns to all of them, or remove them"
                )
        return np.concatenate(present)

    def row_names(self, indices: Sequence[int]) -> list[Any]:
        """`NAME:ROW` of each row that the groups are of, sorted."""
        located = sorted({self._locate(index) for index in indices})
        rows = [(part, self.parts[part][position].row) for part, position in located]
        return [f"{self.mixture.names[part]}:{row}" for part, row in dict.fromkeys(rows)]

    def summary(self) -> str:
        """Lines with the numbers of each source, read and, of training data, in an epoch."""
        lines = [part.summary() for part in self.parts]
        return "\n".join([*lines, *self._of_an_epoch])


Dataset = GroupDataset | GroupMixture


def load_data(
    data: Data, field: DataField, tokenizer: PreTrainedTokenizerBase, rows: RowKind = "pairwise"
) -> Dataset:
    """Tokenize what `data.train` or `data.eval` names, or map what an earlier call has cached.

    rows: the kind of its rows, which decides the columns that are read.

    Raises DataError as `load_groups`.
    """
    sources, split = data.sources(field), SPLITS[field]
    parts = [
        load_groups(source.location, tokenizer, data.of(source), rows, split) for source in sources
    ]
    if isinstance(data.train if field == "train" else data.eval, str):
        return parts[0]
    mixture = Mixture.of(sources, [len(part) for part in parts])
    return GroupMixture(parts, mixture, held_out=field == "eval")


def missing_files(data: Data) -> list[str]:
    """Sources of `data.train` that are no files here."""
    paths = [source.path for source in data.sources("train")]
    return [path for path in paths if not Path(path).expanduser().is_file()]
