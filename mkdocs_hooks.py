"""What the site shows that is not in docs/: README and CONTRIBUTING as pages, and files linked to.

Pages are written to be read in the repository as well, where `../examples/trl_dpo.py` is a link to
a file beside docs/. Such files are carried along under repository/, and links lead there.
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
    """Add the pages from beside docs/, and every file or folder that a page links to."""
    texts = [file.content_string for file in files.documentation_pages()]
    for name, page in PAGES.items():
        texts.append(_LINK.sub(_from_docs, (ROOT / name).read_text(encoding="utf-8")))
        files.append(File.generated(config, page, content=texts[-1]))
    links = {link for text in texts for link in _LINK.findall(text) if link.startswith("../")}
    for path in sorted({ROOT / link.removeprefix("../") for link in links}):
        inside = sorted(p for p in path.glob("*") if p.is_file())
        alone = [path] if path.is_file() else []  # what is not there fails the build
        for source in inside or alone:
            target = f"repository/{source.relative_to(ROOT)}"
            if target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(source)))
        if inside:
            listed = [f"- [{source.name}]({source.name})" for source in inside]
            text = "\n".join([f"# {path.name}", "", *listed])
            target = f"repository/{path.relative_to(ROOT)}/index.md"
            files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead to what is carried along."""
    return _LINK.sub(_to_carried, markdown)


def _from_docs(link: re.Match[str]) -> str:
    """A link of a page beside docs/, as a page in docs/ would write it."""
    if link[0] in PAGES:
        return PAGES[link[0]]
    return link[0].removeprefix("docs/") if link[0].startswith("docs/") else f"../{link[0]}"


def _to_carried(link: re.Match[str]) -> str:
    if not link[0].startswith("../"):
        return link[0]
    path = link[0].removeprefix("../").rstrip("/")
    if path in PAGES:
        return PAGES[path]
    return f"repository/{path}/index.md" if (ROOT / path).is_dir() else f"repository/{path}"
