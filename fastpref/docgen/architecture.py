"""`docs/architecture.md` and its picture: the rooms of the package and their imports.

`python -m fastpref.docgen.architecture`

A room is a folder or a module directly in `fastpref/`, or the kernels' package. Its floor is one
above the highest floor that it imports from. The picture shows the arrows of the transitive
reduction: an import is left out if a longer way through other rooms leads to the same place.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

from fastpref.docgen.markdown import table

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "assets" / "architecture.svg"
KERNELS = "fastpref_kernels"
Arrows = dict[str, set[str]]  # room → the rooms that it imports

_WIDTH, _FLOOR, _BOX, _MARGIN = 960, 84, 34, 12
_STYLE = """
text{font:14px system-ui,sans-serif;text-anchor:middle;fill:#1a237e}
rect{fill:#e8eaf6;stroke:#3f51b5}
path{fill:none;stroke:#7986cb;stroke-width:1.2;marker-end:url(#a)}
"""


def arrows() -> Arrows:
    """Imports between rooms, read from the sources; those inside a room are left out."""
    package = ROOT / "fastpref"
    imports: Arrows = {}
    for path in sorted([*package.rglob("*.py"), *(ROOT / "kernels" / KERNELS).rglob("*.py")]):
        imports.setdefault(room_of(path), set()).update(imported(path))
    return {room: others - {room} for room, others in imports.items()}


def floors(imports: Arrows) -> list[list[str]]:
    """Rooms by floor, from the ground up; raises ValueError for a circle of imports."""
    levels: dict[str, int] = {}

    def level(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise ValueError(f"imports: {' → '.join((*above, room))} is a circle")
        if room not in levels:
            levels[room] = 1 + max((level(o, (*above, room)) for o in imports[room]), default=-1)
        return levels[room]

    for room in imports:
        level(room)
    return [sorted(r for r in levels if levels[r] == n) for n in range(1 + max(levels.values()))]


def reduced(imports: Arrows) -> Arrows:
    """Transitive reduction: the arrows that no longer way through other rooms replaces."""

    def reach(room: str) -> set[str]:
        return imports[room].union(*(reach(other) for other in imports[room]))

    return {
        room: {o for o in others if not any(o in reach(via) for via in others - {o})}
        for room, others in imports.items()
    }


def picture(imports: Arrows) -> str:
    """The rooms, floor above floor, with the arrows of the transitive reduction, as SVG."""
    rows = floors(imports)
    height = _FLOOR * len(rows)
    boxes: dict[str, tuple[float, float, float]] = {}  # center, top, width
    for number, row in enumerate(rows):

        def mean_below(room: str) -> float:
            centers = [boxes[other][0] for other in imports[room]]
            return sum(centers) / len(centers) if centers else 0.0

        top = height - _FLOOR * number - _BOX - _MARGIN
        for place, room in enumerate(sorted(row, key=mean_below)):
            boxes[room] = (place + 0.5) * _WIDTH / len(row), top, 9 * len(room) + 22
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>Rooms of fastpref and their imports</title>",
        f"<style>{_STYLE.strip()}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" style="fill:#7986cb;'
        'stroke:none;marker-end:none"/></marker></defs>',
    ]
    for room, others in sorted(reduced(imports).items()):
        x, ceiling, _ = boxes[room]
        for other in sorted(others):
            to_x, to_ceiling, _ = boxes[other]
            start, end = ceiling + _BOX, to_ceiling - 1
            bend = (end - start) / 2
            lines.append(
                f'<path d="M{x:.0f} {start:.0f}C{x:.0f} {start + bend:.0f} '
                f'{to_x:.0f} {end - bend:.0f} {to_x:.0f} {end:.0f}"/>'
            )
    for room, (center, ceiling, width) in sorted(boxes.items()):
        lines.append(
            f'<rect x="{center - width / 2:.0f}" y="{ceiling:.0f}" width="{width:.0f}" '
            f'height="{_BOX}" rx="6"/>'
        )
        lines.append(f'<text x="{center:.0f}" y="{ceiling + 22:.0f}">{escape(room)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def page(imports: Arrows) -> str:
    """The page around the picture: what each room is for, and what it imports."""
    rows = [
        (f"`{_path(room)}`", _summary(room), ", ".join(sorted(imports[room])) or "–")
        for floor in reversed(floors(imports))
        for room in floor
    ]
    count = sum(map(len, imports.values()))
    return "\n".join(
        [
            "# Architecture",
            "",
            "Every folder of `fastpref/`, and every module beside the folders, is a room. Imports "
            "go one way:",
            "down in this picture, and never in a circle. `tests/test_layers.py` checks it.",
            "",
            "![rooms and imports](assets/architecture.svg)",
            "",
            f"The {len(imports)} rooms have {count} arrows; an arrow is left out of the picture "
            "where a longer way",
            "through other rooms leads to the same room. All of them:",
            "",
            *table(("room", "what it is for", "imports"), rows).splitlines(),
            "",
            "Page and picture are written by `python -m fastpref.docgen.architecture`.",
            "",
        ]
    )


def room_of(path: Path) -> str:
    """Room of a source file."""
    if KERNELS in path.parts:
        return KERNELS
    return path.relative_to(ROOT / "fastpref").parts[0].removesuffix(".py")


def _path(room: str) -> str:
    if room == KERNELS:
        return f"kernels/{KERNELS}/"
    return f"fastpref/{room}/" if (ROOT / "fastpref" / room).is_dir() else f"fastpref/{room}.py"


def _summary(room: str) -> str:
    path = ROOT / _path(room)
    source = path / "__init__.py" if path.is_dir() else path
    doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|")


def imported(path: Path) -> set[str]:
    """Rooms that a source file imports, its own included."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            package, *rest = node.module.split(".")
            if package == "fastpref":
                rooms |= {rest[0]} if rest else {alias.name for alias in node.names}
            elif package == KERNELS:
                rooms.add(KERNELS)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            rooms |= {name[1] for name in names if name[0] == "fastpref" and len(name) > 1}
    return rooms


if __name__ == "__main__":
    imports = arrows()
    PICTURE.write_text(picture(imports), encoding="utf-8")
    PAGE.write_text(page(imports), encoding="utf-8")
