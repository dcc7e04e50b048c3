"""Write preference data built from scored completions: rows to train on, held-out rows, a summary.

The rows go to an unnamed file first, with a few numbers each in memory, because which of them are
held out or discarded is known only after the last one.
"""

from __future__ import annotations

import json
import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastpref.data.formats import TextGroup
from fastpref.data.pair_writers import WRITERS, RowWriter
from fastpref.data.pairs import BUILDS, FORMS, BuiltRow, Recipe, build_rows, draw_key
from fastpref.data.readers import DataError, Record
from fastpref.data.scored import LeftOut, ScoredFile
from fastpref.utils import atomic_files, result_json
from fastpref.utils.errors import UserError

_DISCARDED, _TRAINING, _HELD_OUT = 0, 1, 2
_UNITS = {"k-responses": "group", "binary": "response"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Job:
    """Everything that determines the files which `write_pairs` writes.

    source: file or Hub data set of scored completions.
    out: `.jsonl` or `.parquet` file of the rows to train on. `NAME.eval.jsonl` (or `.parquet`) next
        to it has the held-out rows, `NAME.summary.json` the numbers.
    score, exclude: as in `ScoredFile`.
    held_out: smallest number of rows to hold out; all rows of a prompt stay on one side.
    keep_desired, keep_undesired: share of the responses with label 1 or 0 that is left to train on;
        held-out rows are not thinned.
    """

    source: str
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    score: str | None = None
    exclude: tuple[tuple[str, str], ...] = ()
    held_out: int = 0
    keep_desired: float = 1.0
    keep_undesired: float = 1.0

    @property
    def held_out_path(self) -> Path:
        return self.out.with_suffix(f".eval{self.out.suffix}")

    @property
    def summary_path(self) -> Path:
        return self.out.with_suffix(".summary.json")

    def check(self) -> None:
        """Raise UserError if an option is out of range, or a file is already there."""
        recipe = self.recipe
        _one_of("build", recipe.build, BUILDS)
        if recipe.form is not None:
            _one_of("form", recipe.form, FORMS)
        if recipe.k < 2:
            raise UserError(f"--k: expected at least 2, got {recipe.k}")
        if not 0 <= recipe.min_gap < math.inf:
            raise UserError(f"--min-gap: expected a number >= 0, got {recipe.min_gap}")
        shares = {"keep-desired": self.keep_desired, "keep-undesired": self.keep_undesired}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise UserError(f"--{name}: expected a share > 0 and <= 1, got {share}")
            if share < 1 and recipe.build != "binary":
                raise UserError(f"--{name}: only --build binary has labels; leave it out")
        if self.out.suffix not in WRITERS:
            raise UserError(f"--out: expected a file {' or '.join(WRITERS)}, got {self.out}")
        for out in (self.out, self.held_out_path, self.summary_path):
            if out.exists():
                raise UserError(f"--out: {out} is already there; choose another file")


def write_pairs(job: Job) -> Record:
    """Build and write the files of a job; returns the summary.

    Memory does not grow with the text of the rows. The files appear complete or not at all, and the
    summary is the last of them. Raises UserError for options and data that cannot be used.
    """
    job.check()
    file = ScoredFile(job.source, job.score, job.exclude)
    recipe = job.recipe
    if file.layout == "pairs" and recipe.build != "binary":
        raise UserError(
            f"--build: {job.source} has pairs already; use --build binary, or train on it"
        )
    if file.layout == "ultrafeedback" and recipe.form is None:
        recipe = replace(recipe, form="messages")
    with tempfile.TemporaryFile(dir=_existing(job.out.parent)) as lines:
        rows = _Rows(lines)
        rows.build(file, recipe, job.exclude)
        parts = _split(rows, job)
        summary = _summary(rows, parts, job, file, recipe)
        _write(rows, parts, job, summary)
    return summary


class _Rows:
    """Built rows: their JSON lines in a file, their numbers in arrays."""

    def __init__(self, lines: IO[bytes]) -> None:
        self._lines = lines
        self.used = self.repeated = 0
        self.left_out: Counter[str] = Counter()
        self._prompts, self._draws = array("Q"), array("Q")
        self._numbers = array("d")  # gap, chosen and rejected characters, label of each row

    def build(self, file: ScoredFile, recipe: Recipe, exclude: tuple[tuple[str, str], ...]) -> None:
        """Build the rows of all groups, and count those that are left out."""
        self.left_out.update({f"{column}={text}": 0 for column, text in exclude})
        seen: set[int] = set()
        for group in file:
            rows = group if isinstance(group, LeftOut) else build_rows(group, recipe)
            if isinstance(rows, LeftOut):
                self.left_out[rows.reason] += 1
                continue
            assert isinstance(group, TextGroup)
            prompt = draw_key(recipe.seed, "eval", _normalized(group))
            self.used += 1
            self.repeated += prompt in seen
            seen.add(prompt)
            for row in rows:
                self._add(row, prompt)
        if not self.used:
            reasons = ", ".join(f"{name}: {count:,}" for name, count in self.left_out.items())
            raise DataError(
                f"{file.source}: no group of completions is left ({reasons}); look at the rows"
            )

    def _add(self, row: BuiltRow, prompt: int) -> None:
        self._lines.write(json.dumps(row.record, ensure_ascii=False).encode() + b"\n")
        self._prompts.append(prompt)
        self._draws.append(row.draw)
        self._numbers.extend((row.gap, row.chosen_characters, row.rejected_characters, row.label))

    @property
    def prompts(self) -> Array:
        """Hash of the prompt of each row, (N,) uint64."""
        return np.frombuffer(self._prompts, np.uint64)

    @property
    def draws(self) -> Array:
        """Draw of each labeled response, (N,) uint64; the lowest are left to train on."""
        return np.frombuffer(self._draws, np.uint64)

    @property
    def numbers(self) -> Array:
        """Gap, chosen and rejected characters, label, (N, 4) float64."""
        return np.frombuffer(self._numbers, np.float64).reshape(-1, 4)

    def lines(self) -> Iterator[bytes]:
        self._lines.seek(0)
        return iter(self._lines)


def _normalized(group: TextGroup) -> Any:
    """Prompt by which repetitions are recognized; white space does not tell two texts apart."""
    return " ".join(group.prompt.split()) if isinstance(group.prompt, str) else group.prompt


def _split(rows: _Rows, job: Job) -> Array:
    """Part of each row, (N,): discarded, to train on, or held out."""
    parts = np.full(len(rows.prompts), _TRAINING)
    parts[_held_out(rows.prompts, job.held_out)] = _HELD_OUT
    training = int((parts == _TRAINING).sum())
    if not training:
        raise UserError(f"--eval: {job.held_out} leaves none of {len(parts)} rows; use fewer")
    labels = rows.numbers[:, 3]
    for label, name, share in (
        (1, "keep-desired", job.keep_desired),
        (0, "keep-undesired", job.keep_undesired),
    ):
        (indices,) = np.nonzero((labels == label) & (parts == _TRAINING))
        remaining = round(share * len(indices))
        if len(indices) and not remaining:
            raise UserError(
                f"--{name}: {share} of {len(indices)} responses is none; use a larger share"
            )
        order = np.argsort(rows.draws[indices], kind="stable")
        parts[indices[order[remaining:]]] = _DISCARDED
    return parts


def _held_out(prompts: Array, count: int) -> Array:
    """Whether each row is of a held-out prompt; prompts are drawn until they have `count` rows."""
    distinct, inverse, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    # The hashes are the draws: the prompts with the lowest are held out.
    needed = int(np.searchsorted(sizes.cumsum(), count)) + 1 if count else 0
    return (inverse < min(needed, len(distinct))).reshape(-1)


def _write(rows: _Rows, parts: Array, job: Job, summary: Record) -> None:
    """Write all files; the context managers rename them in reverse order, the summary last."""
    form = WRITERS[job.out.suffix]
    with ExitStack() as files, ExitStack() as writers:
        text = files.enter_context(atomic_files.replacing(job.summary_path))
        text.write_text(result_json.dumps(summary), encoding="utf-8")
        targets: dict[int, RowWriter] = {}
        paths = {_TRAINING: job.out, **({_HELD_OUT: job.held_out_path} if job.held_out else {})}
        for part, path in paths.items():
            temporary = files.enter_context(atomic_files.replacing(path))
            targets[part] = writers.enter_context(form(temporary))
        for line, part in zip(rows.lines(), parts.tolist(), strict=True):
            if part != _DISCARDED:
                targets[part].add(line)


def _summary(
    rows: _Rows, parts: Array, job: Job, file: ScoredFile, recipe: Recipe
) -> dict[str, Any]:
    written = rows.numbers[parts != _DISCARDED]
    gaps, chosen, rejected, labels = written.T
    summary: dict[str, Any] = {
        "source": job.source,
        "layout": file.layout,
        "score": file.score or None,
        **asdict(recipe),
        "exclude": [f"{column}={text}" for column, text in job.exclude],
        "keep_desired": job.keep_desired,
        "keep_undesired": job.keep_undesired,
        "groups": {
            "read": rows.used + sum(rows.left_out.values()),
            "used": rows.used,
            "left_out": dict(rows.left_out.most_common()),
        },
        "prompts": {
            "distinct": len(np.unique(rows.prompts)),
            "repeated": rows.repeated,
        },
        "rows": {
            "unit": _UNITS.get(recipe.build, "pair"),
            "train": int((parts == _TRAINING).sum()),
            "eval": int((parts == _HELD_OUT).sum()),
            "discarded": int((parts == _DISCARDED).sum()),
        },
    }
    if recipe.build == "binary":
        chosen, rejected = chosen[labels == 1], chosen[labels == 0]
        training = rows.numbers[parts == _TRAINING][:, 3]
        summary["labels"] = {
            "desired": int((training == 1).sum()),
            "undesired": int((training == 0).sum()),
        }
    else:
        summary["score_gap"] = _statistics(gaps)
    summary["characters"] = {
        "chosen": _mean(chosen),
        "rejected": _mean(rejected),
    }
    if recipe.build != "binary":
        summary["characters"]["chosen_longer"] = _mean(chosen > rejected)
    return summary


def _statistics(values: Array) -> dict[str, float]:
    return {
        "mean": _mean(values),
        "median": float(np.median(values)),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }


def _mean(values: Array) -> float:
    return float(values.mean())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _one_of(name: str, value: str, names: Iterable[str]) -> None:
    if value not in names:
        raise UserError(f"--{name}: expected one of {', '.join(names)}, got {value}")
