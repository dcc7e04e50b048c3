"""Docstrings, comments and pages keep the house rules of language; see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "fastpref").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# A docstring names the thing or commands; these begin with no subject.
OPENERS = re.compile(r"(That|Those|What|Of|Which|How|Have|Where|Who|Within|Until|When|Why|To|Be)\b")
# Words of a private dialect, and what the field says.
BANNED = {
    r"yardsticks?": "GEMM baseline",
    r"mend(s|ed|ing)?": "fix",
    r"unasked": "unless requested",
    r"strangers?": "out-of-range labels",
    r"so many of": "a number of",
    r"was told|is told|are told": "say who reads what",
    r"made again": "recomputed",
    r"beside the others?": "alongside",
}
BRITISH = re.compile(
    r"\b(\w*colour\w*|\w*centre[sd]?|behaviour\w*|neighbour\w*|favour\w*|grey|catalogue\w*|"
    r"labelled|cancell(ed|ing)|modell(ed|ing)|artefacts?|optimis\w+|normalis\w+|quantis\w+|"
    r"tokenis\w+|initialis\w+|generalis\w+|realis(e|ed|es|ing)|organis\w+|summaris\w+|"
    r"minimis\w+|maximis\w+|serialis\w+|parallelis(e|ed|es|ing)|recognis\w+|analyse[sd]?)\b",
    re.IGNORECASE,
)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, comments and messages of a source; of a page all but code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.S)
        text = re.sub(r"`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.S)
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        sentence = token.type == tokenize.STRING and len(token.string.split()) >= 5
        if sentence or token.type == tokenize.COMMENT:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, re.sub(r"`[^`]*`", "", line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_a_subject(path: Path) -> None:
    assert [f"{line}: {text[:60]}" for line, text in docstrings(path) if OPENERS.match(text)] == []


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_the_words_and_the_spelling_of_the_field(path: Path) -> None:
    banned = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
    problems = [
        f"{line}: {match[0]} in {text.strip()[:80]}"
        for line, text in prose(path)
        for match in (banned.search(text), BRITISH.search(text))
        if match
    ]
    assert problems == []
