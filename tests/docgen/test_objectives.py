"""The page of objectives is the docstrings, and is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpref import losses
from fastpref.docgen import objectives

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == objectives.markdown(), (
        "run: python -m fastpref.docgen.objectives > docs/objectives.md"
    )


@pytest.mark.parametrize("name", losses.names())
def test_every_objective_is_explained_in_full(name: str) -> None:
    text = objectives.plain(name)
    about = losses.describe(name)
    for part in (about.summary, about.formula, about.incentives, about.source, about.use):
        assert part and part in text
    assert f"{about.kind} ({about.level} level)" in text
