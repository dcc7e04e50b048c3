"""Tokenized groups on disk: an Arrow file, read through a memory map."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from fastpref.config import Data
from fastpref.data import dropped
from fastpref.data.formats import RowKind, SftOn
from fastpref.data.readers import DataError, content_hash
from fastpref.data.sft import group_kind, read_rows_of
from fastpref.data.template_source import printed_day, template_fingerprint
from fastpref.data.tokenize import PARTS, Ids, chunks, tokenize
from fastpref.losses import Kind
from fastpref.utils import atomic_files

Lengths = np.ndarray[Any, np.dtype[np.int64]]
Weights = np.ndarray[Any, np.dtype[np.float32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
_TRAINED_ON: dict[SftOn, str] = {
    "completion": "the completion",
    "assistant": "assistant messages",
    "all": "all tokens",
}
UNITS: dict[Kind, str] = {"pairwise": "pair", "pointwise": "response", "groupwise": "group"}
# Part of the cache key: bump it when tokenization or the file format changes.
_VERSION = "6"
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "labels": pa.list_(pa.float64()),
        "reference": pa.list_(pa.float64()),
        "weights": pa.list_(pa.list_(pa.float32())),
        "mask": pa.list_(pa.bool_()),
        "margin": pa.float64(),
    }
)


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """Token ids of a prompt and of its responses, none of them empty."""

    index: int  # position in the data set
    row: int  # row of the source, from 1
    prompt: Ids
    responses: tuple[Ids, ...]  # of a pair: chosen, rejected
    labels: tuple[float, ...] | None = None  # as in TextGroup
    token_weights: tuple[Weights, ...] | None = None  # one for each token of each response
    first: int = 0  # index of its first response among all responses of the data set
    mask: Mask | None = None  # which tokens of its only response are scored; None: all
    margin: float | None = None  # as in TextGroup; None unless all pairs have one


class IndexedGroups(Protocol):
    """Groups of a kind, by their indices."""

    kind: Kind

    def __getitem__(self, index: int) -> TokenGroup: ...


class Groups(Protocol):
    """Data set of N groups, as read by the batch plan, the collation and the reference."""

    source: str
    kind: Kind
    fingerprint: str  # hash of the token ids alone
    offsets: Lengths  # (N + 1,) responses of group g: offsets[g] to offsets[g + 1] - 1

    @property
    def prompt_lengths(self) -> Lengths:
        """Number of prompt tokens of each group, (N,)."""

    @property
    def response_lengths(self) -> Lengths:
        """Number of tokens of each response, (offsets[N],)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TokenGroup: ...
    @property
    def padded_lengths(self) -> Lengths:
        """Number of tokens of the longest prompt + response of each group, (N,)."""

    def given_reference_logps(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Reference log-probs of all responses from the data's columns, or None."""


class GroupDataset:
    """Tokenized groups in a folder: a memory-mapped Arrow file and `about.json` with counts."""

    mixture = None  # of several sources, see `fastpref.data.sources`

    def __init__(self, folder: Path, source: str) -> None:
        self.source = source
        table = pa.ipc.open_file(pa.memory_map(str(folder / "groups.arrow"))).read_all()
        self._columns = {name: table[name] for name in table.column_names}
        about = json.loads((folder / "about.json").read_text())
        self.kind: Kind = about["kind"]
        self.counts: dict[str, int] = about["counts"]
        self.fingerprint: str = about["token_ids"]
        self.labels: str = about["labels"]  # hash of labels, reference, weights, margins
        self.sft_on: SftOn | None = about["sft_on"]
        self._max_prompt_length: int | None = about["max_prompt_length"]
        self._day: str | None = about["day"]  # that the chat template prints
        self._unused: str | None = about["unused"]  # option for conversations
        sizes, self.prompt_lengths = (_sizes(table[name]) for name in ("responses", "prompt"))
        self.response_lengths = _sizes(pc.list_flatten(table["responses"]))  # of all responses
        self.offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> TokenGroup:
        columns = {name: column[index] for name, column in self._columns.items()}
        responses = tuple(response.values.to_numpy() for response in columns["responses"].values)
        labels = columns["labels"].as_py()
        if labels is None and self.has_preferences:
            labels = [1.0]  # some pairs have soft labels, so a missing one means p = 1
        weights = None
        if columns["weights"].is_valid:
            weights = tuple(w.values.to_numpy() for w in columns["weights"].values)
        elif self.has_token_weights:
            weights = tuple(np.ones(len(r), dtype=np.float32) for r in responses)
        return TokenGroup(
            index,
            columns["row"].as_py(),
            columns["prompt"].values.to_numpy(),
            responses,
            None if labels is None else tuple(labels),
            weights,
            int(self.offsets[index]),
            columns["mask"].values.to_numpy(zero_copy_only=False)
            if columns["mask"].is_valid
            else None,
            None if self.without_margin else columns["margin"].as_py(),
        )

    @cached_property
    def has_preferences(self) -> bool:
        """Whether any pair has a soft label."""
        return self.kind == "pairwise" and self._columns["labels"].null_count < len(self)

    @cached_property
    def has_token_weights(self) -> bool:
        """Whether any pair has token weights."""
        return self._columns["weights"].null_count < len(self)

    @cached_property
    def padded_lengths(self) -> Lengths:
        longest = np.maximum.reduceat(self.response_lengths, self.offsets[:-1])
        return self.prompt_lengths + longest

    @cached_property
    def without_margin(self) -> int:
        """Number of pairs without a margin."""
        return self._columns["margin"].null_count

    def label_values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Labels of all groups, concatenated."""
        return pc.list_flatten(self._columns["labels"]).to_numpy()

    def margin_values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Margins of all pairs, in which all have one."""
        return self._columns["margin"].to_numpy()

    def prompt_bytes(self) -> Iterator[bytes]:
        """Token ids of each prompt as bytes, for comparing prompts."""
        for chunk in self._columns["prompt"].chunks:
            values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
            yield from (values[a:b].tobytes() for a, b in pairwise(offsets))

    def given_reference_logps(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Reference log-probs of all responses from the data's columns, or None.

        Raises DataError if only some rows have them, or if truncation has changed the responses.
        """
        missing = self._columns["reference"].null_count
        if missing == len(self):
            return None
        cut = sum(count for name, count in self.counts.items() if name.endswith("_cut"))
        if missing or cut:
            limit = "max_prompt_length" if self.counts["long_prompts_cut"] else "max_length"
            reason = f"{missing:,} rows have none" if missing else f"some rows are cut to {limit}"
            raise DataError(
                f"{self.source}: ref_chosen_logps and ref_rejected_logps cannot be used, {reason}; "
                f"complete or remove the columns, or raise data.{limit}"
            )
        return pc.list_flatten(self._columns["reference"]).to_numpy()

    def row_names(self, indices: Sequence[int]) -> list[Any]:
        """Number of each row that the groups are of, sorted."""
        return sorted({self[index].row for index in indices})

    def summary(self) -> str:
        """One line with the numbers of groups that were read, dropped and truncated."""
        counts, unit = self.counts, UNITS[self.kind]
        total, remaining = counts["found"], counts["kept"]
        names = (*PARTS[self.kind], "prompts")
        cut = ", ".join(f"{counts[f'{name}_cut']:,} {name}" for name in names)
        parts = [
            f"{remaining:,} of {total:,} {unit}s from {self.source}; dropped "
            f"{total - remaining:,} ({dropped.reasons(counts)}); "
            f"cut to max_length: {cut}"
        ]
        if self._max_prompt_length is not None:
            parts.append(f"cut to max_prompt_length: {counts['long_prompts_cut']:,} of the prompts")
        parts += dropped.losses(counts)
        if self._unused is not None:
            parts.append(f"data.{self._unused} is not used, as no row is a conversation")
        if self._day is not None:
            parts.append(f"the chat template prints the date {self._day} (data.template_date)")
        if self.sft_on is not None:
            parts.append(f"trained on: {_TRAINED_ON[self.sft_on]}")
        elif self.kind == "pointwise":
            desirable = int(self.label_values().sum())
            parts.append(f"{desirable:,} desirable, {len(self) - desirable:,} undesirable")
            rows = self._columns["row"].to_numpy()
            if (rows[1:] == rows[:-1]).any():
                parts.append("each pair is two responses: chosen is desirable, rejected is not")
        return "; ".join(parts)


def load_groups(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    rows: RowKind = "pairwise",
    default_split: str = "train",
) -> GroupDataset:
    """Tokenize a source, or map the cached result of an earlier call with the same content.

    rows: the kind of its rows, which decides the columns that are read.

    Raises DataError if the data is unreadable or of another kind, or if no group is left.
    """
    content = content_hash(source, default_split)
    excluded = {"train", "eval", "cache", "chat_template", "template_date"}
    excluded |= {"streaming", "shuffle_window"}  # of other data
    options = json.dumps([rows, data.model_dump(exclude=excluded)])
    template = template_fingerprint(tokenizer, data)
    key = atomic_files.sha256(
        _VERSION, content, tokenizer_fingerprint(tokenizer), template, options
    )
    folder = Path(data.cache).expanduser() / "tokens" / key
    if not folder.exists():
        with atomic_files.replacing(folder) as temporary:
            _write(temporary, source, tokenizer, data, rows, default_split)
    dataset = GroupDataset(folder, source)
    if len(dataset) == 0:
        unit = UNITS[dataset.kind]
        raise DataError(
            f"{source}: no {unit} is left to train on ({dataset.summary()}); "
            f"{dropped.remedy(dataset.counts)}"
        )
    return dataset


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines the token ids of a text or conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = [
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.split_special_tokens,
    ]
    if backend is None:
        # A tokenizer in Python keeps its options, such as lower case, nowhere else.
        special.append(tokenizer.init_kwargs)
    return atomic_files.sha256(
        type(tokenizer).__name__, vocabulary, json.dumps(special, sort_keys=True, default=str)
    )


def _write(
    folder: Path,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    row_kind: RowKind,
    split: str,
) -> None:
    kind = group_kind(row_kind)
    counts = no_counts(kind)
    groups = read_rows_of(source, row_kind, data, split)
    about = write_groups(
        folder, kind, tokenize(chunks(groups, 512), source, tokenizer, data, kind, counts), counts
    )
    about["sft_on"] = data.sft_on if row_kind == "sft" else None
    about["max_prompt_length"] = data.max_prompt_length
    about["day"] = printed_day(tokenizer, data) if counts["conversations"] else None
    options = ("chat_template", "chat_template_kwargs")
    unused = (name for name in options if getattr(data, name) and not counts["conversations"])
    about["unused"] = next(unused, None)
    (folder / "about.json").write_text(json.dumps(about))


def no_counts(kind: Kind) -> Counter[str]:
    """Counts of `tokenize` before the first group."""
    counts = Counter({name: 0 for name in ("found", "kept", "no_completion", "long_prompts_cut")})
    counts.update({f"{name}_cut": 0 for name in (*PARTS[kind], "prompts")})
    return counts


def write_groups(
    folder: Path, kind: Kind, batches: Iterable[list[dict[str, Any]]], counts: Counter[str]
) -> dict[str, Any]:
    """Write groups as `tokenize` yields them, and return the content of `about.json`.

    counts: of `tokenize`, complete after the last batch.
    """
    ids, labels = hashlib.sha256(kind.encode()), hashlib.sha256()
    folder.mkdir()
    with (
        pa.OSFile(str(folder / "groups.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for rows in batches:
            for row in rows:
                annotations = [row[name] for name in ("labels", "reference", "weights", "margin")]
                labels.update(json.dumps(annotations).encode())
                sequences = (row["prompt"], *row["responses"])
                ids.update(len(sequences).to_bytes(4, "little"))
                for tokens in sequences:
                    ids.update(len(tokens).to_bytes(4, "little"))
                    ids.update(tokens)
                if row["mask"] is not None:
                    ids.update(row["mask"])
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    about: dict[str, Any] = {"kind": kind, "counts": counts}
    about |= {"token_ids": ids.hexdigest(), "labels": labels.hexdigest()}
    return about | dict.fromkeys(("sft_on", "max_prompt_length", "day", "unused"))


def _sizes(lists: pa.ChunkedArray) -> Lengths:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)
