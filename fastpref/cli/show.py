"""The command `fastpref data show`: the first rows of a data set as they are trained."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fastpref.utils.errors import UserError

if TYPE_CHECKING:
    from fastpref.config import Config
    from fastpref.config.sources import Source
    from fastpref.data.preview import Piece, Preview

# Colors of pieces: in a terminal, and on a page by light and by dark background.
_STYLES = {"prompt": "cyan", "response": "green", "unscored": "yellow", "cut": "dim strike"}
_CUT_SHOWN = 160  # characters of a text that is cut, in a terminal
_LEGEND = {
    "prompt": "prompt",
    "response": "trained on",
    "unscored": "not trained on",
    "cut": "left out",
}


def show(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [key=value …]",
            help="Data, by default data.train of the config, and changes of the config.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml", help="The config, whose model and data settings apply."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each source.")] = 5,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page instead of text.")
    ] = None,
) -> None:
    """Show the first rows as they are trained, in tokens, and what is cut or dropped."""
    files = [item for item in arguments or [] if "=" not in item or os.path.exists(item)]
    overrides = [item for item in arguments or [] if item not in files]
    if config is None and files and files[0].endswith((".yaml", ".yml")):
        config = Path(files.pop(0))
    if config is None:
        raise UserError("--config: is missing; name the config that the data is trained with")
    if len(files) > 1:
        raise UserError(f"FILE: takes one file, got {' and '.join(files)}; run it for each")

    from fastpref.config import load
    from fastpref.utils.progress import quiet_libraries

    quiet_libraries()
    loaded = load(config, overrides, lambda note: None)
    shown = {
        source.location: list(_previews(loaded, source, rows))
        for source in _sources(loaded, files[0] if files else None)
    }
    if html is not None:
        from fastpref.utils.atomic_files import replacing

        with replacing(html) as temporary:
            temporary.write_text(_page(shown), encoding="utf-8")
        print(f"page: {html}")
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, previews in shown.items():
        for preview in previews:
            console.print(as_text(preview))
        console.print(_summary(name, previews), markup=False)


def _sources(config: Config, file: str | None) -> list[Source]:
    """Sources to show: a file, with its settings in the config if it is there, or `data.train`."""
    from fastpref.config.sources import Source
    from fastpref.utils.paths import expand

    data = config.data
    if file is None:
        return data.sources("train")
    path = expand(file)
    known = [*data.sources("train"), *data.sources("eval")]
    named = (source for source in known if path in (source.path, source.location))
    return [next(named, Source(path=path))]


def _previews(config: Config, source: Source, limit: int) -> Iterable[Preview]:
    from fastpref.data.preview import previews
    from fastpref.data.sft import row_kind
    from fastpref.data.tokenizers import tokenizer_of

    loss, data = config.build_loss(), config.data.of(source)
    if source.path == config.data.train:
        data = data.model_copy(update={"streaming": config.data.streaming})
    rows = row_kind(loss, data)
    tokenizer = tokenizer_of(config.model, config.data, rows)
    return previews(source.location, tokenizer, data, rows, limit)


def _title(preview: Preview) -> str:
    if preview.error:
        return f"row {preview.row:,}: stops the run"
    title = f"row {preview.row:,}"
    if preview.dropped:
        return f"{title}: dropped, {preview.dropped}"
    details = [part.summary for part in preview.parts]
    return f"{title}: {'; '.join([*details, *preview.notes])}"


def _summary(name: str, previews: list[Preview]) -> str:
    rows = {preview.row for preview in previews}
    counts = {
        "cut": sum(preview.is_cut for preview in previews),
        "dropped": sum(bool(preview.dropped) for preview in previews),
        "with errors, which stop the run": sum(bool(preview.error) for preview in previews),
    }
    details = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
    return f"{len(rows):,} row{'s' * (len(rows) != 1)} of {name}" + (
        f": {details}" if details else ""
    )


def as_text(preview: Preview) -> Text:
    """Title and parts of a preview, in colors."""
    text = Text(_title(preview) + "\n", style="")
    text.stylize("bold red" if preview.error or preview.dropped else "bold")
    if preview.error:
        text.append(f"{_visible(preview.error)}\n")
    for part in preview.parts:
        text.append(f"{part.name}\n", style="bold")
        for piece in part.pieces:
            # Words say in a file what colors say in a terminal.
            text.append(_marked(piece), style=_STYLES[piece.kind])
        text.append("\n")
    return text


def _marked(piece: Piece) -> str:
    text = _visible(piece.text)
    if piece.kind in ("prompt", "response"):
        return text
    if piece.kind == "cut" and len(text) > _CUT_SHOWN:
        text = f"{text[:_CUT_SHOWN]} …"
    return f"[{_LEGEND[piece.kind]}: {text}]"


def _visible(text: str) -> str:
    """The text with control characters, which a terminal obeys, as their codes."""
    return "".join(
        f"\\x{ord(char):02x}" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
        for char in text
    )


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #16181d); }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .85rem; font-weight: 600; margin: .8rem 0 .2rem; color: light-dark(#666, #999); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .6rem .8rem;
  border-radius: 6px; background: light-dark(#f6f7f9, #1e2127); 
  font: 13px/1.5 ui-monospace, monospace; }
mark { color: inherit; border-radius: 3px; }
.prompt { background: light-dark(#d7e9fb, #17395c); }
.response { background: light-dark(#d6f2d6, #17492a); }
.unscored { background: light-dark(#fbefc4, #54460f); }
.cut { background: light-dark(#f9d9d9, #5a2020); text-decoration: line-through; }
.problem { color: light-dark(#b00020, #ff8a80); }
"""


def _page(shown: dict[str, list[Preview]]) -> str:
    legend = " ".join(f'<mark class="{kind}">{words}</mark>' for kind, words in _LEGEND.items())
    body = "".join(
        f"<h1>{escape(_summary(name, previews))}</h1>\n<p>{legend}</p>\n"
        + "".join(map(_section, previews))
        for name, previews in shown.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Data as it is trained</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def _section(preview: Preview) -> str:
    kind = ' class="problem"' if preview.error or preview.dropped else ""
    parts = [f"<h2{kind}>{escape(_title(preview))}</h2>\n"]
    if preview.error:
        parts.append(f"<p>{escape(_visible(preview.error))}</p>\n")
    for part in preview.parts:
        pieces = (
            f'<mark class="{piece.kind}" title="{_LEGEND[piece.kind]}, {piece.tokens:,} tokens">'
            f"{escape(_visible(piece.text))}</mark>"
            for piece in part.pieces
        )
        # A line break behind <pre> is not shown, so that one keeps another.
        parts.append(f"<h3>{escape(part.name)}</h3><pre>\n{''.join(pieces)}</pre>\n")
    return "".join(parts)
