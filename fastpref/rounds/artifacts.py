"""Files of a round, named by everything that determines them, complete or absent.

A long file of samples grows in shards in `NAME.partial`, from which a restarted run goes on. Of
several ranks, the first one reads and writes all files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref.model.reference_policy import is_intact
from fastpref.utils.atomic_files import remove, replacing
from fastpref.utils.errors import UserError

Row = dict[str, Any]
_DIGITS = 16  # of a name


class RoundFiles:
    """Folder of one round of a run; round 0 is the start."""

    def __init__(self, run: Path, number: int) -> None:
        self.folder = run / "rounds" / f"{number:04d}"
        self.number = number

    def path(self, kind: str, key: str, suffix: str = ".jsonl") -> Path:
        """Path of a file whose content the key determines."""
        return self.folder / f"{kind}-{key[:_DIGITS]}{suffix}"

    def read(self, kind: str, key: str) -> list[Row] | None:
        """Rows of a file, None if it is not there."""
        path = self.path(kind, key)
        if not path.exists():
            return None
        # A kill may have come between the complete file and the end of its shards.
        remove(_shards_of(path))
        try:
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        except ValueError:
            raise _damaged(path) from None

    def write(self, kind: str, key: str, rows: Iterable[Row]) -> None:
        """Write a complete file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing(self.path(kind, key)) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def read_tensors(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """Tensors of a file on the CPU, None if it is not there."""
        path = self.path(kind, key, ".safetensors")
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            raise _damaged(path) from None

    def write_tensors(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Write a complete file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(self.path(kind, key, ".safetensors")) as temporary:
            save_file(on_host, temporary)

    def check_is_there(self, kind: str, key: str, suffix: str = ".jsonl") -> None:
        """Raise UserError for a missing file whose weights have moved on."""
        path = self.path(kind, key, suffix)
        if not path.exists():
            raise self._lost(path, "missing")

    def check_logps(self, kind: str, key: str) -> None:
        """Raise UserError for missing or damaged log-probs whose weights have moved on."""
        self.check_is_there(kind, key, ".safetensors")
        path = self.path(kind, key, ".safetensors")
        if not is_intact(path):
            raise self._lost(path, "damaged")

    def _lost(self, path: Path, problem: str) -> UserError:
        return UserError(
            f"{path}: is {problem}, and the weights that it was made with have been trained since; "
            f"restore it, or resume from a checkpoint before round {self.number}"
        )

    def shards(self, kind: str, key: str) -> Shards:
        """Rows of a file that is not complete yet."""
        return Shards(_shards_of(self.path(kind, key)))


class Shards:
    """Rows that are appended in shards and survive a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Row]:
        """Rows so far; a torn last line is removed from the file."""
        rows: list[Row] = []
        if self._path.exists():
            rows = _whole_lines(self._path)
            with replacing(self._path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def append(self, rows: list[Row]) -> None:
        """Write a shard to disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the shards, after the complete file is written."""
        remove(self._path)


def _shards_of(path: Path) -> Path:
    return path.with_suffix(".partial")


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: is damaged; remove it, and the run makes it again if the weights of its "
        "round are still those of the newest checkpoint"
    )


def _whole_lines(path: Path) -> list[Row]:
    """Rows up to the first line that is not whole."""
    rows: list[Row] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows
