"""Data files for the runs of a seed: generated pairs and groups, or a user's groups.

A seed's rows have three parts without a common prompt: one for the warm-up, so that no model starts
with responses that it is trained on or judged by, one for training, one held out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.data import bpe
from fastpref.data.synthetic import graded, pure_semantic
from fastpref.reproduce.sizes import Size
from fastpref.utils.errors import UserError

Rows = list[dict[str, Any]]
# Most characters of a prompt for each token of max_length, so that responses have room.
_PROMPT = 2
_EVALUATED = 100  # held-out rows that are evaluated during training
_SHARES = (0.15, 0.5)  # of a user's prompts: where training rows begin, and held-out ones
_HELD_OUT_CONTRASTS = 0.3  # leaves 1,050 held-out pairs
# For the warm-up: sentences of no pair with the words of the pairs, and words of no pair in the
# sentences of the pairs.
_WARM_UP = (
    ("Tell me about one {noun}.", " Many people know {word} well."),
    ("Name any {noun} you have heard of.", " One that comes to mind is {word}."),
    ("What do people talk about?", " People often talk about {word} these days."),
)
_STAND_INS = ("something", "everything", "nothing", "anything")


class Parts(NamedTuple):
    """Rows of a seed."""

    warm_up: Rows
    train: Rows
    held_out: Rows


def rare(rows: Rows, label: bool) -> Rows:
    """Single responses with only one in a hundred of that label, but at least one."""
    singles = graded.singles(rows)
    labeled = [row for row in singles if row["label"] is label]
    rare_rows = labeled[: max(1, len(labeled) // 100)]
    return [row for row in singles if row["label"] is not label or row in rare_rows]


def best_and_random(rows: Rows) -> Rows:
    """Groups reduced to the best response and another one, drawn from the rest."""
    reduced = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["completions"], strict=True), reverse=True)
        other = random.Random(repr(row)).choice(ranked[1:])
        scores, completions = map(list, zip(ranked[0], other, strict=True))
        reduced.append({"prompt": row["prompt"], "completions": completions, "scores": scores})
    return reduced


KINDS: dict[str, Callable[[Rows], Rows]] = {
    "pairs": graded.pairs,
    "singles": graded.singles,
    "1 % desired": partial(rare, label=True),
    "1 % undesired": partial(rare, label=False),
    "best and random": best_and_random,
    "4 responses": partial(graded.top, count=graded.RESPONSES),
}
_HELD_OUT_KINDS = {"1 % desired": "singles", "1 % undesired": "singles"}
# Pure-semantic pairs: whether each has a probability of its own, as in the paper, or words have
# utilities.
SEMANTIC = {"semantic": True, "semantic, utilities": False}


def write(folder: Path, kind: str, seed: int, groups: Parts, limit: int | None = None) -> None:
    """Write the files of a kind, under the names of `files`.

    groups: rows with scores; unused for the pure-semantic kinds. limit: of the held-out rows.
    """
    parts = _semantic(SEMANTIC[kind], seed) if kind in SEMANTIC else _of_kind(kind, groups)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = parts.held_out[:limit]
    named = (parts.warm_up, parts.train, held_out, held_out[:_EVALUATED])
    for path, part in zip(files(folder, kind), named, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _of_kind(kind: str, groups: Parts) -> Parts:
    held_out = KINDS[_HELD_OUT_KINDS.get(kind, kind)](groups.held_out)
    return Parts(KINDS[kind](groups.warm_up), KINDS[kind](groups.train), held_out)


def _semantic(independent: bool, seed: int) -> Parts:
    pairs = pure_semantic.generate(seed, independent=independent)
    train, held_out = pure_semantic.split(pairs, seed, _HELD_OUT_CONTRASTS)
    return Parts(
        _semantic_warm_up(), [vars(pair) for pair in train], [vars(pair) for pair in held_out]
    )


def _semantic_warm_up() -> Rows:
    """Rows in which every word is as often chosen as rejected; no response is one of a pair."""
    return [
        {
            "prompt": f"User: {question.format(noun=noun)}\nAssistant:",
            "chosen": answer.format(word=word),
            "rejected": answer.format(word=choices[k - 1]),
        }
        for noun, words in pure_semantic.SETS.items()
        for templates, choices in ((_WARM_UP, words), (pure_semantic.TEMPLATES, _STAND_INS))
        for question, answer in templates
        for k, word in enumerate(choices)
    ]


class Files(NamedTuple):
    """Paths of a kind of data."""

    warm_up: Path
    train: Path
    held_out: Path
    eval: Path  # the first held-out rows


def files(folder: Path, kind: str) -> Files:
    """The files of a kind; those of the held-out rows do not depend on imbalance of the others."""
    name = kind.replace(" %", "-percent").replace(", ", "-").replace(" ", "-")
    return Files(
        *(folder / f"{name}-{part}.jsonl" for part in ("warm-up", "train", "held-out", "eval"))
    )


def groups_of(size: Size, seed: int, source: Path | None) -> Parts:
    """The groups of a seed in three parts: generated, or those of a user's file in random order."""
    if source is None:
        rows = graded.groups(size.prompts, seed, per_prompt=size.per_prompt)
        parts = (size.warm_up, size.train, size.held_out)
        first, second = (sum(parts[:k]) * size.per_prompt for k in (1, 2))
        return Parts(rows[:first], rows[first:second], rows[second:])
    by_prompt: dict[str, Rows] = {}
    for row in read(source, size.max_length, size.prompts * size.per_prompt):
        by_prompt.setdefault(row["prompt"], []).append(row)
    prompts = random.Random(seed).sample(sorted(by_prompt), len(by_prompt))
    first, second = (round(share * len(prompts)) for share in _SHARES)
    slices = (prompts[:first], prompts[first:second], prompts[second:])
    return Parts(*([row for prompt in part for row in by_prompt[prompt]] for part in slices))


def train_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Train a tokenizer on all files of a folder of data but the held-out ones, and save it."""
    texts = (
        text
        for path in sorted([*folder.glob("*-warm-up.jsonl"), *folder.glob("*-train.jsonl")])
        for line in path.read_text(encoding="utf-8").splitlines()
        for text in _texts(json.loads(line))
    )
    tokenizer = folder / "tokenizer"
    bpe.train(texts, vocab_size).save_pretrained(tokenizer)
    return tokenizer


def _texts(row: dict[str, Any]) -> list[str]:
    names = ("prompt", "chosen", "rejected", "completion")
    return [row[name] for name in names if name in row] + row.get("completions", [])


def read(path: Path, max_length: int, count: int) -> Rows:
    """Read the first groups of a user's file whose prompts leave room for a response.

    Raises UserError for a file without `prompt, completions, scores`, or with too few groups.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        groups = [
            row
            for row in rows
            if len(row["prompt"]) <= _PROMPT * max_length
            and min(len(row["completions"]), len(row["scores"])) >= graded.RESPONSES
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--data: {path}: expected JSON lines with prompt, completions and scores ({error})"
        ) from None
    if len(groups) < 50:
        raise UserError(
            f"--data: {path}: expected 50 groups of {graded.RESPONSES} scored responses with "
            f"prompts of at most {_PROMPT * max_length} characters, got {len(groups)}"
        )
    return [
        {
            **row,
            "completions": row["completions"][: graded.RESPONSES],
            "scores": row["scores"][: graded.RESPONSES],
        }
        for row in groups[:count]
    ]
