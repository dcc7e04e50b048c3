"""The table of the loops that were run."""

from __future__ import annotations

from typing import Any

from benchmarks.loops.libraries import LOOPS
from fastpref.docgen import markdown

COLUMNS = ("", "versions", "heads", "ranks apart", "parameters", "last loss")


def table(results: dict[str, Any]) -> str:
    """A row for each loop with results: versions of its packages, and its largest errors."""
    return markdown.table(COLUMNS, [_row(name, results[name]) for name in LOOPS if name in results])


def _row(name: str, result: dict[str, Any]) -> list[str]:
    loop = LOOPS[name]
    versions = ", ".join(f"{package} {result['versions'][package]}" for package in loop.packages)
    heads = ", ".join("tied" if tied else "untied" for tied in loop.heads)
    errors = [_digits(result.get(key)) for key in ("between_ranks", "parameters", "loss")]
    return [loop.title, versions, heads, *errors]


def _digits(error: float | None) -> str:
    if error is None:
        return "–"
    return f"{error:.0e}".replace("e-0", "e-") if error else "0"
