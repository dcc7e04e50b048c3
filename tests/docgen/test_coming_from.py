"""The page for users of other trainers is written from the tables of the config, and is current."""

from __future__ import annotations

from pathlib import Path

from fastpref.docgen import coming_from

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == coming_from.markdown(), (
        "run: python -m fastpref.docgen.coming_from > docs/coming-from.md"
    )
