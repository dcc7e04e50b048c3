"""docs/troubleshooting.md has every message of the sources, and each is reached by a test."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.bad_input import commands, configs, data, models
from tests.bad_input.messages import pattern, templates
from tests.bad_input.test_bad_models import MISSING, OUT_OF_MEMORY

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "troubleshooting.md"
# Messages that no test reaches, and why.
UNREACHED = {
    "the measuring process has ended": "by the operating system, for its memory",
}


@cache
def entries() -> dict[str, str]:
    """The messages of the page, and what it says of each."""
    found = re.findall(r"^- (``? ?)(.+?) ?``?\n  (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {message: text for _, message, text in found}


def test_the_page_has_every_message_and_no_other() -> None:
    missing = [f"{path}: {template}" for template, path in templates().items()]
    missing = [line for line in missing if line.partition(": ")[2] not in entries()]
    assert missing == [], "write an entry in docs/troubleshooting.md"
    assert [message for message in entries() if message not in templates()] == [], "stale"
    assert all(text.endswith(".") for text in entries().values())


@cache
def said() -> tuple[str, ...]:
    """The lines of all cases of bad input, and what other tests quote."""
    cases = [*commands.CASES, *configs.CASES, *data.CASES, *models.CASES]
    lines = [case.says for case in cases if case.says]
    tests = (
        path.read_text("utf-8") for path in TESTS.glob("**/test_*.py") if path != Path(__file__)
    )
    # Without the breaks and backslashes that strings and patterns put into a message.
    quoted = (re.sub(r"\\|\"\s*[fr]*\"", "", text) for text in tests)
    return *lines, *MISSING, OUT_OF_MEMORY, *quoted


def is_reached(template: str) -> bool:
    """Whether a test quotes words that only this message has; of a short one, all of it."""
    parts = [part for part in re.split(r"\{\w*\}", template) if len(part) >= 12]
    words = [part[k : k + 16] for part in parts for k in range(max(1, len(part) - 15))]
    if words:
        return any(each in line for each in words for line in said())
    return any(pattern(template).search(line) for line in said())


@pytest.mark.parametrize("template", templates())
def test_a_message_is_reached(template: str) -> None:
    assert is_reached(template) == (template not in UNREACHED)
