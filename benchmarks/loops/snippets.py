"""Python snippets of a Markdown page, by the heading above them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTEGRATIONS = ROOT / "docs" / "integrations.md"
_PART = re.compile(
    r"^#+ (?P<heading>[^\n]*)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def of_page(page: Path = INTEGRATIONS) -> list[tuple[str, str]]:
    """Heading and code of each Python block, in order; "" is the part above the first heading."""
    heading, snippets = "", []
    for part in _PART.finditer(page.read_text(encoding="utf-8")):
        if part["heading"] is not None:
            heading = part["heading"]
        elif part["language"] == "python":
            snippets.append((heading, part["code"]))
    return snippets


def under(heading: str, page: Path = INTEGRATIONS) -> list[str]:
    """Blocks directly below a heading. Raises KeyError if there is none."""
    blocks = [code for above, code in of_page(page) if above == heading]
    if not blocks:
        raise KeyError(f"{page.name}: no Python block below the heading {heading!r}")
    return blocks
