"""Measurements in README and docs agree with the result files that they name.

A block is the text between two blank lines. A block that contains a quantity (a number with a unit,
or in a table a decimal fraction) has one of these comments before it:

    <!-- table: NAME, from FILE -->           `benchmarks/tables.py` writes the table from the file
    <!-- figures: FILE#KEY/KEY; 8 24 -->      every number of the block is in the file (below the
                                              keys), except those listed after the semicolon
    <!-- not measured: REASON -->             settings, predictions, figures from other sources

The section of the block also links to the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Pages that are generated from sources without measurements.
GENERATED = {"config.md", "objectives.md"}
PAGES = [p for p in (*tables.PAGES, ROOT / "CONTRIBUTING.md") if p.name not in GENERATED]

# Factors between a number in a file and the number with this unit on a page.
UNITS = {
    "": (1,),
    "%": (100,),
    "×": (1,),
    "times": (1,),
    "s": (1,),
    "ms": (1e3,),
    "min": (1 / 60,),
    "h": (1 / 3600,),
    "MiB": (1, 2**-20),
    "GiB": (2**-10, 2**-30),
    "MB": (1e-6,),
    "GB": (1e-9,),
    "TFLOP/s": (1, 1e-12),
    "pairs/s": (1,),
    "tokens/s": (1,),
}
_UNIT = "|".join(sorted(map(re.escape, filter(None, UNITS)), key=len, reverse=True))
_UNIT = _UNIT.replace("×", r"×(?! ?\d)")  # 1.4 × as fast, but not 128 × 64
# No part of a word, such as bf16 or 8B.
_NUMBER = re.compile(
    rf"(?<![\w.,])(\d[\d,]*(?:\.\d+)?(?:e[-−]?\d+)?)(?:[ \u202f]?({_UNIT}))?(?!\w)"
)
_MARKER = re.compile(r"<!-- (table|figures|not measured): (.+?) -->", re.DOTALL)


class Number(NamedTuple):
    text: str
    unit: str

    def is_in(self, values: list[float]) -> bool:
        """Whether one of the values equals this number, to its printed digits."""
        mantissa, _, exponent = self.text.replace(",", "").replace("−", "-").partition("e")
        printed = float(f"{mantissa}e{exponent or 0}")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        tolerance = 0.5 * 10.0**-digits * (1 + 1e-9)
        return any(abs(abs(v) * f - printed) <= tolerance for v in values for f in UNITS[self.unit])


def numbers(block: str) -> list[Number]:
    """Numbers of a block, except those in code and in the targets of links."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", block, flags=re.DOTALL)
    return [Number(text.rstrip(","), unit) for text, unit in _NUMBER.findall(text)]


def has_quantity(block: str) -> bool:
    is_table = block.startswith("|")
    return any(n.unit or (is_table and "." in n.text) for n in numbers(block))


def blocks(page: str) -> Iterator[tuple[str, str, str, str]]:
    """Section, kind and content of the marker, and block, for each block of a page."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    for section in re.split(r"^#+ .*$", page, flags=re.MULTILINE):
        kind = content = ""
        for block in filter(None, map(str.strip, section.split("\n\n"))):
            if marker := _MARKER.fullmatch(block):
                kind, content = marker.groups()
            elif not block.startswith("<!--"):
                yield section, kind, content, block
                kind = content = ""


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def problems(page: str) -> list[str]:
    """Problems with the figures of a page, one line per problem."""
    lines = []
    for section, kind, content, block in blocks(page):
        messages = []
        if not kind and has_quantity(block):
            messages = ["no comment says where the figures are from"]
        elif kind in ("table", "figures"):
            messages = problems_of(section, kind, content, block)
        lines += [f"{message}: {block.splitlines()[0][:60]}" for message in messages]
    return lines


def problems_of(section: str, kind: str, content: str, block: str) -> list[str]:
    """Problems with the figures of a block whose marker names a file."""
    source, _, listed = content.partition("; ")
    file, _, keys = source.rpartition(" ")[2].partition("#")
    if not (ROOT / file).is_file():
        return [f"no such file as {file}"]
    if Path(file).name not in re.sub(r"<!--.*?-->", "", section, flags=re.DOTALL):
        return [f"the section does not link to {file}"]
    if kind == "table":
        return []
    below: Any = json.loads((ROOT / file).read_text())
    for key in filter(None, keys.split("/")):
        below = below[key]
    values = list(leaves(below))
    unlisted = [n for n in numbers(block) if n.text not in listed.split()]
    return [f"{n.text} {n.unit} is not in {source}" for n in unlisted if not n.is_in(values)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_of_a_page_are_those_of_its_files(page: Path) -> None:
    assert problems(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_agree_with_their_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run: python -m benchmarks.tables"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_no_text_runs_into_a_table(page: Path) -> None:
    """Markdown takes a line right after a table for one of its rows."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^\|.*\n(?!\||```)(.+)$", text, re.MULTILINE) == []


def test_every_generated_table_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- table: (\S+), from ", text)) == set(tables.TABLES)


FILE = "benchmarks/results/end-to-end-cpu.json"
LINK = f"[numbers]({FILE})"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("It takes 3 s.", "no comment says"),
        ("- one\n- 36 % of it", "no comment says"),
        ("| a | b |\n|---|---|\n| x | 0.25 |", "no comment says"),
        (f"<!-- figures: {FILE} -->\n\n5.2 times", "does not link to"),
        (f"{LINK}\n\n# next\n\n<!-- figures: {FILE} -->\n\n5.2 times", "does not link to"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n5.3 times {LINK}", "5.3 times is not in"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n37 of {LINK}", "37  is not in"),
        (f"<!-- figures: {FILE}#against_trl; 34 -->\n\n37% of {LINK}", "37 % is not in"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n5.2 times {LINK}\n\n5 s", "no comment says"),
        ("<!-- figures: benchmarks/results/none.json -->\n\n1 s", "no such file as"),
        ("<!-- table: none, from benchmarks/results/none.json -->\n\n| 1 s |", "no such file as"),
    ],
)
def test_figures_without_a_source_are_found(page: str, message: str) -> None:
    (problem,) = problems(page)
    assert message in problem


@pytest.mark.parametrize(
    "page",
    [
        f"<!-- figures: {FILE}#against_trl; 11 -->\n\n11, 34% and 3e-05, 24 {LINK}",
        f"<!-- figures: {FILE}#summary/TRL -->\n\n7.3 s and 3,398 MiB or 3.3 GiB {LINK}",
        "<!-- not measured: set so -->\n\nup to 1 GiB",
        "`5 s`, [a](b-5%20s), 8B, bf16, 128 × 64, 3 steps\n\n```\n5 s\n```",
    ],
)
def test_figures_with_a_source_have_no_problems(page: str) -> None:
    assert problems(page) == []


def test_a_table_that_was_changed_by_hand_is_restored() -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    changed = page.replace("| 0.952 |", "| 0.953 |")
    assert changed != page and tables.with_tables(changed) == page


def test_the_memory_of_large_vocabularies() -> None:
    points = json.loads((RESULTS / "bench-cpu.json").read_text())["points"]
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    for name, words in (
        ("fastpref cpu", "it is {:.0f} MiB at V 32,768 and {:.0f} MiB at V 262,144"),
        ("torch full logits", "full logits take {:,.0f} MiB and {:,.0f} MiB"),
    ):
        sizes = {
            p["V"]: p["extra_bytes"] / 2**20
            for p in points
            if (p["op"], p["implementation"], p["head"]) == ("linear_logps", name, "frozen")
            and "extra_bytes" in p
            and p["T"] == 1024
        }
        assert words.format(sizes[32768], sizes[262144]) in text


def test_every_step_of_gradient_descent_went_as_the_band_predicts() -> None:
    runs = json.loads((RESULTS / "calibration.json").read_text())["training"]["runs"]
    measured = [run["one_step"] for run in runs if "one_step" in run]
    assert len(measured) == 16 and all(step["agree"] == 1 for step in measured)
