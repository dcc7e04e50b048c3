"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table with a row of titles; a cell may have any text of one line."""
    names = list(titles)
    lines = [_line(names), "|---" * len(names) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in escaped)
