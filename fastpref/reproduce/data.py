"""Data files for the runs of a seed: generated pairs and groups, or a user's groups."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.data.synthetic import graded, pure_semantic
from fastpref.utils.errors import UserError

Rows = list[dict[str, Any]]
HELD_OUT = 0.2  # share of the prompts
# Most characters of a prompt for each token of max_length, so that responses have room.
_PROMPT = 2


def rare(rows: Rows, label: bool) -> Rows:
    """Single responses with only one in a hundred of that label, but at least one."""
    singles = graded.singles(rows)
    labeled = [row for row in singles if row["label"] is label]
    rare_rows = labeled[: max(1, len(labeled) // 100)]
    return [row for row in singles if row["label"] is not label or row in rare_rows]


KINDS: dict[str, Callable[[Rows], Rows]] = {
    "pairs": graded.pairs,
    "singles": graded.singles,
    "1 % desired": partial(rare, label=True),
    "1 % undesired": partial(rare, label=False),
    "2 responses": partial(graded.top, count=2),
    "4 responses": partial(graded.top, count=4),
}
_HELD_OUT_KINDS = {"1 % desired": "singles", "1 % undesired": "singles"}


def write(folder: Path, kind: str, seed: int, rows: Rows) -> None:
    """Write the training file and the held-out file of a kind, under the names of `files`.

    rows: groups; unused for "semantic", the pure-semantic pairs.
    """
    if kind == "semantic":
        train, held_out = (
            [vars(pair) for pair in part]
            for part in pure_semantic.split(pure_semantic.generate(seed), seed)
        )
    else:
        shuffled = random.Random(seed).sample(rows, len(rows))
        count = int(len(rows) * HELD_OUT)
        train = KINDS[kind](shuffled[count:])
        held_out = KINDS[_HELD_OUT_KINDS.get(kind, kind)](shuffled[:count])
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(files(folder, kind), (train, held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))


def files(folder: Path, kind: str) -> tuple[Path, Path]:
    """The training file and the held-out file of a kind."""
    name = kind.replace(" %", "-percent").replace(" ", "-")
    return folder / f"{name}.jsonl", folder / f"{name}-held-out.jsonl"


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
