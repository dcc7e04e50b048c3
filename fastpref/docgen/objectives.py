"""Generate `docs/objectives.md` and `fastpref losses NAME` from the docstrings of objectives.

`python -m fastpref.docgen.objectives > docs/objectives.md`
"""

from __future__ import annotations

from fastpref import losses
from fastpref.docgen.markdown import table
from fastpref.losses import Description

_SECTIONS = {
    ("pairwise", "sequence"): "On pairs of a chosen and a rejected response",
    ("pairwise", "token"): "On pairs, token by token",
    ("pointwise", "sequence"): "On single responses, desirable or not",
    ("groupwise", "sequence"): "On groups of scored responses to one prompt",
}


def markdown() -> str:
    """Return the page."""
    lines = [
        "# Objectives",
        "",
        'In a config `loss: {name: dpo, beta: 0.1}`, in Python `losses.build("dpo", beta=0.1)`.',
        "This page is generated: `python -m fastpref.docgen.objectives > docs/objectives.md`.",
        "",
        f"Notation: {losses.NOTATION}.",
    ]
    described = [losses.describe(name) for name in losses.names()]
    for section, title in _SECTIONS.items():
        lines += ["", f"## {title}"]
        for about in (a for a in described if (a.kind, a.level) == section):
            lines += ["", f"### {about.name}", "", about.summary, "", table(("", ""), _rows(about))]
            lines += ["", about.notes] if about.notes else []
    return "\n".join(lines) + "\n"


def plain(name: str) -> str:
    """Return the text of one objective for a terminal; raises ValueError for an unknown name."""
    about = losses.describe(name)
    rows = "\n".join(f"{label + ':':12}{text}" for label, text in _rows(about))
    title = f"{name}, {about.kind} ({about.level} level): {about.summary}"
    parts = (title, rows, about.notes, losses.NOTATION)
    return "\n\n".join(part for part in parts if part)


def _rows(about: Description) -> list[tuple[str, str]]:
    defaults = ", ".join(f"{key} {value}" for key, value in about.defaults.items())
    return [
        ("loss", about.formula),
        ("incentives", about.incentives),
        ("reference", "needed" if about.needs_reference else "not used"),
        ("defaults", defaults or "no parameters"),
        ("source", about.source),
        ("use", about.use),
    ]


if __name__ == "__main__":
    print(markdown(), end="")
