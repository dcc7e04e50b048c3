"""Text pairs → token ids, once: cut to length, stored as Arrow, mapped into memory.

The response starts at the longest common token prefix of (prompt, prompt + chosen,
prompt + rejected), each tokenised whole, so that a token that merges across the boundary is scored
and is the token that the model will see.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from fastpref import files
from fastpref.config import Data
from fastpref.data.formats import DataError, TextPair, common_prefix, content_hash, read_pairs
from fastpref.errors import first_line

T = TypeVar("T")
_VERSION = "1"  # raise it when the same text gives other tokens
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt": pa.list_(pa.int32()),
        "chosen": pa.list_(pa.int32()),
        "rejected": pa.list_(pa.int32()),
        "p": pa.float64(),
        "ref_chosen": pa.float64(),
        "ref_rejected": pa.float64(),
    }
)


@dataclass(frozen=True, eq=False)
class TokenPair:
    """Token ids; the prompt has at least one, each response too."""

    index: int  # position in the data set
    row: int  # row of the source, from 1
    prompt: np.ndarray[Any, np.dtype[np.int32]]
    chosen: np.ndarray[Any, np.dtype[np.int32]]
    rejected: np.ndarray[Any, np.dtype[np.int32]]
    preference: float | None  # probability that chosen is preferred


class PairDataset:
    """Tokenised pairs: a folder with an Arrow file, read through a memory map, and its counts."""

    def __init__(self, folder: Path, source: str) -> None:
        self.source = source
        table = pa.ipc.open_file(pa.memory_map(str(folder / "pairs.arrow"))).read_all()
        self._columns = {name: table[name] for name in table.column_names}
        about = json.loads((folder / "about.json").read_text())
        self.counts: dict[str, int] = about["counts"]
        self.fingerprint: str = about["token_ids"]  # hash of the token ids alone
        self.labels: str = about["labels"]  # hash of p and of the given reference log-probs
        p = self._columns["p"]
        self.has_preferences: bool = p.null_count < len(p)
        self.lengths = {
            name: pc.list_value_length(table[name]).to_numpy().astype(np.int64)
            for name in ("prompt", "chosen", "rejected")
        }

    def __len__(self) -> int:
        return len(self.lengths["prompt"])

    def __getitem__(self, index: int) -> TokenPair:
        columns = self._columns
        prompt, chosen, rejected = (
            columns[name][index].values.to_numpy() for name in ("prompt", "chosen", "rejected")
        )
        row, p = columns["row"][index].as_py(), columns["p"][index].as_py()
        if p is None and self.has_preferences:
            p = 1.0  # beside soft labels, none means certain
        return TokenPair(index, row, prompt, chosen, rejected, p)

    @cached_property
    def padded_lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of the longer prompt + response of each pair, (N,)."""
        return self.lengths["prompt"] + np.maximum(self.lengths["chosen"], self.lengths["rejected"])

    def given_reference_logps(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """(N, 2) reference log-probs (chosen, rejected) that came with the data, or None.

        Raises DataError if only some rows have them, or if responses were cut since.
        """
        columns = [self._columns[name] for name in ("ref_chosen", "ref_rejected")]
        missing = columns[0].null_count
        if missing == len(self):
            return None
        cut = self.counts["chosen_cut"] + self.counts["rejected_cut"] + self.counts["prompt_cut"]
        if missing or cut:
            reason = f"{missing:,} rows have none" if missing else "some rows are cut to max_length"
            raise DataError(
                f"{self.source}: ref_chosen_logps and ref_rejected_logps cannot be used, {reason}; "
                "complete or remove the columns, or raise data.max_length"
            )
        return np.stack([column.to_numpy() for column in columns], axis=1)

    def summary(self) -> str:
        c = self.counts
        dropped = c["rows"] - c["kept"]
        return (
            f"{c['kept']:,} of {c['rows']:,} pairs from {self.source}; dropped {dropped:,} "
            f"(no completion left: {c['no_completion']:,}); cut to max_length: "
            f"{c['chosen_cut']:,} chosen, {c['rejected_cut']:,} rejected, "
            f"{c['prompt_cut']:,} prompts"
        )


def load_pairs(
    source: str, tokenizer: PreTrainedTokenizerBase, data: Data, default_split: str = "train"
) -> PairDataset:
    """Tokenise a source, or map the result of an earlier call with the same content.

    Raises DataError for unreadable data, or if no pair is left.
    """
    content = content_hash(source, default_split)
    options = json.dumps([data.max_length, data.truncation, data.add_eos, data.soft_labels])
    key = files.sha256(_VERSION, content, tokenizer_fingerprint(tokenizer), options)
    folder = Path(data.cache).expanduser() / "tokens" / key
    if not folder.exists():
        with files.replacing(folder) as temporary:
            _write(temporary, source, tokenizer, data, default_split)
    dataset = PairDataset(folder, source)
    if len(dataset) == 0:
        raise DataError(f"{source}: no pair is left to train on ({dataset.summary()})")
    return dataset


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides the token ids of a text or conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template]
    return files.sha256(type(tokenizer).__name__, vocabulary, json.dumps(special, sort_keys=True))


def _write(
    folder: Path, source: str, tokenizer: PreTrainedTokenizerBase, data: Data, split: str
) -> None:
    counts = Counter({name: 0 for name in ("rows", "kept", "no_completion")})
    counts.update({name: 0 for name in ("prompt_cut", "chosen_cut", "rejected_cut")})
    ids, labels = hashlib.sha256(), hashlib.sha256()
    folder.mkdir()
    with (
        pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for numbered in chunks(read_pairs(source, split), 512):
            rows = list(tokenize(numbered, source, tokenizer, data, counts))
            for row in rows:
                values = [row["p"], row["ref_chosen"], row["ref_rejected"]]
                labels.update(json.dumps(values).encode())
                for name in ("prompt", "chosen", "rejected"):
                    ids.update(np.asarray([len(row[name]), *row[name]], dtype="<i4").tobytes())
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    about = {"counts": counts, "token_ids": ids.hexdigest(), "labels": labels.hexdigest()}
    (folder / "about.json").write_text(json.dumps(about))


def tokenize(
    numbered: list[tuple[int, TextPair]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Rows of `_SCHEMA` for the pairs that keep a completion; `counts` is kept up to date."""
    texts: list[str] = []
    special: list[bool] = []
    for number, pair in numbered:
        try:
            rendered = _render(pair, tokenizer)
        except Exception as error:  # a chat template may raise anything
            raise DataError(
                f"{source}, row {number}: chat template failed: {first_line(error)}"
            ) from None
        texts.extend(rendered)
        bos = tokenizer.bos_token
        special.append(not pair.conversational and not (bos and rendered[0].startswith(bos)))
    ids = _encode(texts, [s for s in special for _ in range(3)], tokenizer)
    for (number, pair), triple in zip(numbered, chunks(ids, 3), strict=True):
        counts["rows"] += 1
        tokens = _split_and_cut(triple, pair.conversational, tokenizer, data)
        if tokens is None:
            counts["no_completion"] += 1
            continue
        counts["kept"] += 1
        counts.update(tokens.cut)
        reference = pair.reference_logps or (None, None)
        yield {
            "row": number,
            "prompt": tokens.prompt,
            "chosen": tokens.chosen,
            "rejected": tokens.rejected,
            "p": pair.preference if data.soft_labels else None,
            "ref_chosen": reference[0],
            "ref_rejected": reference[1],
        }


def _render(pair: TextPair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Prompt, prompt + chosen, prompt + rejected as the texts that are tokenised."""
    if isinstance(pair.prompt, str):
        return pair.prompt, pair.prompt + str(pair.chosen), pair.prompt + str(pair.rejected)
    if tokenizer.chat_template is None:
        raise ValueError("the data is conversational but the tokenizer has no chat template")

    def apply(messages: list[dict[str, Any]], opening: bool) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tools=pair.tools, tokenize=False, add_generation_prompt=opening
        )

    return (
        apply(pair.prompt, True),
        apply([*pair.prompt, *pair.chosen], False),
        apply([*pair.prompt, *pair.rejected], False),
    )


def _encode(
    texts: list[str], special: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids; texts that already carry their special tokens are encoded without adding any."""
    ids: list[list[int]] = [[] for _ in texts]
    for add in (True, False):
        chosen = [i for i, flag in enumerate(special) if flag is add]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=add)["input_ids"]
            for i, tokens in zip(chosen, encoded, strict=True):
                ids[i] = tokens
    return ids


class _Tokens(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: Counter[str]


def _split_and_cut(
    ids: list[list[int]],  # prompt, prompt + chosen, prompt + rejected
    conversational: bool,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> _Tokens | None:
    """Common prefix, EOS, context and truncation; None where no completion is left."""
    prompt, chosen, rejected = ids
    start = common_prefix(prompt, chosen, rejected)
    responses = [chosen[start:], rejected[start:]]
    eos = tokenizer.eos_token_id
    if data.add_eos and not conversational and eos is not None:
        responses = [r if r and r[-1] == eos else [*r, eos] for r in responses]
    context = prompt[:start]
    if not context:  # something must predict the first token
        opener = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if opener is None:
            return None
        context = [opener]
    cut: Counter[str] = Counter()
    if data.truncation == "keep_end":
        excess = len(context) + max(map(len, responses)) - data.max_length
        if excess > 0 and len(context) > 1:
            keep = max(1, len(context) - excess)
            first = context[:1] if context[0] == tokenizer.bos_token_id else []
            context = first + context[len(context) - keep + len(first) :]
            cut["prompt_cut"] += 1
    room = data.max_length - len(context)
    if room < 1 or not all(responses):
        return None
    for name, response in zip(("chosen_cut", "rejected_cut"), responses, strict=True):
        cut[name] += len(response) > room
    return _Tokens(context, responses[0][:room], responses[1][:room], cut)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
