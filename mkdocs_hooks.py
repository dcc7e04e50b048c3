"""MkDocs hooks: add README, CONTRIBUTING and linked repository files to the site.

Pages can also be read in the repository, where a link such as `../examples/trl_dpo.py` points to a
file outside docs/. The hooks copy such files to repository/ in the site and rewrite the links.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and every file or folder that a page links to."""
    texts = [file.content_string for file in files.documentation_pages()]
    for name, page in PAGES.items():
        texts.append(_LINK.sub(_from_docs, (ROOT / name).read_text(encoding="utf-8")))
        files.append(File.generated(config, page, content=texts[-1]))
    links = {link for text in texts for link in _LINK.findall(text) if link.startswith("../")}
    for path in sorted({ROOT / link.removeprefix("../") for link in links}):
        inside = sorted(p for p in path.glob("*") if p.is_file())
        # A missing path adds nothing here, and then fails the strict build.
        sources = inside or ([path] if path.is_file() else [])
        for source in sources:
            target = f"repository/{source.relative_to(ROOT)}"
            if target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(source)))
        if inside:
            items = [f"- [{source.name}]({source.name})" for source in inside]
            text = "\n".join([f"# {path.name}", "", *items])
            target = f"repository/{path.relative_to(ROOT)}/index.md"
            files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite links out of docs/ so that they point to the copied files."""
    return _LINK.sub(_to_copy, markdown)


def _from_docs(link: re.Match[str]) -> str:
    """Convert a link of a page in the repository root to a link of a page in docs/."""
    if link[0] in PAGES:
        return PAGES[link[0]]
    return link[0].removeprefix("docs/") if link[0].startswith("docs/") else f"../{link[0]}"


def _to_copy(link: re.Match[str]) -> str:
    """Convert a link out of docs/ to a link to the page or the copied file in the site."""
    if not link[0].startswith("../"):
        return link[0]
    path = link[0].removeprefix("../").rstrip("/")
    if path in PAGES:
        return PAGES[path]
    return f"repository/{path}/index.md" if (ROOT / path).is_dir() else f"repository/{path}"
