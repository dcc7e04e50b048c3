"""Pairs of scored completions, and the groups of token ids that the objective trains on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpref import distributed
from fastpref.data.dataset import GroupDataset, no_counts, write_groups
from fastpref.data.formats import TextGroup
from fastpref.data.pairs import Build, Recipe, build_rows
from fastpref.data.prompts import response_to
from fastpref.data.scored import LeftOut
from fastpref.losses import Kind
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.utils.atomic_files import replacing, sha256

BUILDS: dict[str, Build] = {
    "best_worst": "best-worst",
    "best_random": "best-random",
    "all": "all-pairs",
}


class Pairs(NamedTuple):
    """Pairs of a round, and the prompts that give none, by reason."""

    rows: list[Row]
    left_out: dict[str, int]


def pair(
    files: RoundFiles,
    key: str,
    samples: Sequence[Row],
    scores: Sequence[Sequence[float]],
    recipe: Recipe,
) -> Pairs:
    """Read the pairs from their file, or make and write them.

    A row has the texts, the scores, and the numbers of its `group` and `samples`, whose token ids
    are trained on.
    """
    rows = files.read("pairs", key)
    if rows is None:
        left_out: Counter[str] = Counter()
        rows = []
        for index, (sample, values) in enumerate(zip(samples, scores, strict=True)):
            built = _pairs_of(index, sample, values, recipe)
            if isinstance(built, LeftOut):
                left_out[built.reason] += 1
            else:
                rows += built
        files.write("left-out", key, [dict(left_out)])
        files.write("pairs", key, rows)
    counts = files.read("left-out", key)
    return Pairs(rows, counts[0] if counts else {})


def _pairs_of(
    index: int, sample: Row, scores: Sequence[float], recipe: Recipe
) -> list[Row] | LeftOut:
    texts: list[str] = sample["completions"]
    group = TextGroup(sample["prompt"], tuple(texts), labels=tuple(scores))
    built = build_rows(group, recipe)
    if isinstance(built, LeftOut):
        return built
    # Of equal texts with equal scores the first stands for all.
    numbers: dict[tuple[str, float], int] = {}
    for number, place in enumerate(zip(texts, scores, strict=True)):
        numbers.setdefault(place, number)
    rows = []
    for one in (row.record for row in built):
        places = [(one[side], one[f"score_{side}"]) for side in ("chosen", "rejected")]
        columns: Row = {
            name: sample[name] for name in ("tools", "chat_template_kwargs") if name in sample
        }
        rows.append(
            {
                "prompt": sample["prompt"],
                **columns,
                "chosen": response_to(sample["prompt"], one["chosen"]),
                "rejected": response_to(sample["prompt"], one["rejected"]),
                "score_chosen": one["score_chosen"],
                "score_rejected": one["score_rejected"],
                "group": index,
                "samples": [numbers[place] for place in places],
            }
        )
    return rows


def groups_of(
    kind: Kind,
    cache: Path,
    samples: Sequence[Row],
    scores: Sequence[Sequence[float]],
    pairs: Sequence[Row],
    with_margin: bool,
    source: str,
) -> GroupDataset:
    """Groups of the sampled token ids, for an objective of a kind, through a file in the cache.

    Groupwise ones get all completions of the prompts that have a pair. with_margin: give each pair
    the difference of its scores as its margin.
    """
    if kind == "groupwise":
        rows = _scored_groups(samples, scores, dict.fromkeys(row["group"] for row in pairs))
    elif kind == "pointwise":
        rows = _labeled(samples, pairs)
    else:
        rows = [_pair(samples, row, with_margin) for row in pairs]
    return _dataset(cache, kind, rows, source)


def groups_of_all(
    cache: Path, samples: Sequence[Row], scores: Sequence[Sequence[float]], source: str
) -> GroupDataset:
    """Groups of all completions, also of prompts whose scores are equal, through a file as well."""
    rows = _scored_groups(samples, scores, range(len(samples)))
    return _dataset(cache, "groupwise", rows, source)


def worst_case(
    kind: Kind, cache: Path, prompt: Sequence[int], length: int, samples: int
) -> GroupDataset:
    """A group as large as a round may have, and a smaller one, to choose layout and memory by.

    Their responses are tokens of the prompt, in the second one each of another length.
    """
    count = {"pairwise": 2, "pointwise": 1, "groupwise": samples}[kind]
    tokens = np.resize(np.asarray(prompt, dtype=np.int32), length)
    largest = tuple(np.roll(tokens, k) for k in range(count))
    smaller = tuple(tokens[k * length // (2 * count) :] for k in range(count))
    labels = _example_labels(kind, count)
    rows = [_group(k + 1, prompt, part, labels) for k, part in enumerate((largest, smaller))]
    return _dataset(cache, kind, rows, "the largest groups of a round")


def _dataset(cache: Path, kind: Kind, rows: list[Row], source: str) -> GroupDataset:
    """Groups in a file of the cache that is named by their content."""
    parts: list[str] = [kind]
    for row in rows:
        sequences = [row["prompt"].tolist(), *(ids.tolist() for ids in row["responses"])]
        parts.append(json.dumps([row["row"], sequences, row["labels"], row["margin"]]))
    folder = cache / "tokens" / f"sampled-{sha256(*parts)}"
    with distributed.main_process_first():
        if not folder.exists():
            counts = no_counts(kind)
            counts["found"] = counts["kept"] = len(rows)
            with replacing(folder) as temporary:
                about = write_groups(temporary, kind, [rows], counts)
                (temporary / "about.json").write_text(json.dumps(about))
    return GroupDataset(folder, source)


def _example_labels(kind: Kind, count: int) -> tuple[float, ...] | None:
    if kind == "pairwise":
        return None
    return (1.0,) if kind == "pointwise" else tuple(map(float, range(count)))


def _pair(samples: Sequence[Row], row: Row, with_margin: bool) -> Row:
    sample = samples[row["group"]]
    responses = tuple(sample["tokens"][k] for k in row["samples"])
    margin = row["score_chosen"] - row["score_rejected"] if with_margin else None
    return _group(row["group"] + 1, sample["prompt_tokens"], responses, None, margin)


def _labeled(samples: Sequence[Row], pairs: Sequence[Row]) -> list[Row]:
    return [
        _group(row["group"] + 1, sample["prompt_tokens"], (sample["tokens"][number],), (label,))
        for row in pairs
        for sample in [samples[row["group"]]]
        for number, label in zip(row["samples"], (1.0, 0.0), strict=True)
    ]


def _scored_groups(
    samples: Sequence[Row], scores: Sequence[Sequence[float]], indices: Iterable[int]
) -> list[Row]:
    """All completions of some prompts."""
    return [
        _group(
            index + 1,
            samples[index]["prompt_tokens"],
            tuple(samples[index]["tokens"]),
            tuple(scores[index]),
        )
        for index in indices
    ]


def _group(
    row: int,
    prompt: Sequence[int],
    responses: tuple[Any, ...],
    labels: tuple[float, ...] | None,
    margin: float | None = None,
) -> Row:
    return {
        "row": row,
        "prompt": np.asarray(prompt, dtype=np.int32),
        "responses": tuple(np.asarray(tokens, dtype=np.int32) for tokens in responses),
        "labels": labels,
        "reference": None,
        "weights": None,
        "mask": None,
        "margin": margin,
    }
