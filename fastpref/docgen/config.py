"""Generate `docs/config.md` from the declarations in `fastpref.config`.

`python -m fastpref.docgen.config > docs/config.md`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastpref.config import Config, Section, inner_section
from fastpref.config.schema import item_section
from fastpref.docgen.markdown import table


class Row(NamedTuple):
    """A field of the config, as text."""

    path: str
    type: str
    default: str
    description: str


def rows(section: type[Section] = Config, prefix: str = "") -> Iterator[Row]:
    """Yield every field of the config, sections before their fields."""
    described: set[type[Section]] = set()
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner = inner_section(field)
        description = field.description or ""
        yield Row(path, "section" if inner else _type_name(field), _default(field), description)
        items = item_section(field)
        if inner is not None:
            yield from rows(inner, f"{path}.")
        # Lists of the same sections, as `data.train` and `data.eval`, are described once.
        elif items is not None and items not in described:
            yield from rows(items, f"{path}[].")
            described.add(items)


def markdown() -> str:
    """Return the page."""
    lines = [
        "# Config",
        "",
        "`fastpref train CONFIG.yaml [section.key=value …]`: every field, its type and default.",
        "[Coming from another trainer](coming-from.md) translates the keys of other trainers.",
        "This page is generated: `python -m fastpref.docgen.config > docs/config.md`.",
        "",
    ]
    cells = ((f"`{row.path}`", row.type, row.default, row.description) for row in rows())
    lines.append(table(("field", "type", "default", "meaning"), cells))
    return "\n".join(lines) + "\n"


def plain() -> str:
    """Return the fields as text for a terminal, two lines per field."""
    return "\n".join(
        f"{row.path}  ({row.type}; {row.default})\n    {row.description}" for row in rows()
    )


def _type_name(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(meta, key):g}"
        for meta in field.metadata
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(meta, key, None) is not None
    ]
    return " ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    if not arguments:
        return getattr(annotation, "__name__", str(annotation))
    if all(isinstance(a, str) for a in arguments):
        return " | ".join(f"`{a}`" for a in arguments)
    origin = getattr(annotation, "__origin__", None)
    if origin in (list, dict, tuple):
        return f"{origin.__name__}[{', '.join(_name(a) for a in arguments)}]"
    if hasattr(annotation, "__metadata__"):
        return _name(arguments[0])
    return " | ".join(_name(a) for a in arguments)


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Section):
        return "optional"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


if __name__ == "__main__":
    print(markdown(), end="")
