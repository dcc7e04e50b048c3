"""Measurements in README and docs are those of the result files that they name.

A block of a page, which is what stands between blank lines, has a comment before it if it holds a
quantity (a number with a unit; in a table a decimal fraction, too):

    <!-- table: NAME, from FILE -->           a table that `benchmarks/tables.py` makes of the file
    <!-- figures: FILE#KEY/KEY; 8 24 -->      every number of the block, but for those listed behind
                                              the semicolon, is in the file (below the keys)
    <!-- not measured: REASON -->             settings, predictions, figures of others

and a file that is named so is also linked to in the same section, where readers see it.
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
# Pages that a program writes whole, from sources that hold no measurement.
GENERATED = {"config.md", "objectives.md", "kernels-compiled.md"}
PAGES = [p for p in (*tables.PAGES, ROOT / "CONTRIBUTING.md") if p.name not in GENERATED]

# What a number in a file is multiplied by to be one on a page.
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
        """Whether one of the values is this number, to the digits that are printed."""
        mantissa, _, exponent = self.text.replace(",", "").replace("−", "-").partition("e")
        printed = float(f"{mantissa}e{exponent or 0}")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        room = 0.5 * 10.0**-digits * (1 + 1e-9)
        return any(abs(abs(v) * f - printed) <= room for v in values for f in UNITS[self.unit])


def numbers(block: str) -> list[Number]:
    """Those that a reader sees as such: not in code, not in the targets of links."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", block, flags=re.DOTALL)
    return [Number(text.rstrip(","), unit) for text, unit in _NUMBER.findall(text)]


def has_quantity(block: str) -> bool:
    is_table = block.startswith("|")
    return any(n.unit or (is_table and "." in n.text) for n in numbers(block))


def blocks(page: str) -> Iterator[tuple[str, str, str, str]]:
    """Section, kind of marker, what the marker says, block."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    for section in re.split(r"^#+ .*$", page, flags=re.MULTILINE):
        kind = said = ""
        for block in filter(None, map(str.strip, section.split("\n\n"))):
            if marked := _MARKER.fullmatch(block):
                kind, said = marked.groups()
            elif not block.startswith("<!--"):
                yield section, kind, said, block
                kind = said = ""


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def problems(page: str) -> list[str]:
    """What is wrong with the figures of a page, one line each."""
    found = []
    for section, kind, said, block in blocks(page):
        wrong = []
        if not kind and has_quantity(block):
            wrong = ["no comment says where the figures are from"]
        elif kind in ("table", "figures"):
            wrong = problems_of(section, kind, said, block)
        found += [f"{what}: {block.splitlines()[0][:60]}" for what in wrong]
    return found


def problems_of(section: str, kind: str, said: str, block: str) -> list[str]:
    """What is wrong with a block that names a file."""
    source, _, listed = said.partition("; ")
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
def test_tables_are_what_is_made_of_their_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run: python -m benchmarks.tables"


def test_every_table_that_is_made_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- table: (\S+), from ", text)) == set(tables.TABLES)


FILE = "benchmarks/results/end-to-end-cpu.json"
LINK = f"[numbers]({FILE})"


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("It takes 3 s.", "no comment says"),
        ("- one\n- 36 % of it", "no comment says"),
        ("| a | b |\n|---|---|\n| x | 0.25 |", "no comment says"),
        (f"<!-- figures: {FILE} -->\n\n4.6 times", "does not link to"),
        (f"{LINK}\n\n# next\n\n<!-- figures: {FILE} -->\n\n4.6 times", "does not link to"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n4.7 times {LINK}", "4.7 times is not in"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n36 of {LINK}", "36  is not in"),
        (f"<!-- figures: {FILE}#against_trl; 36 -->\n\n37% of {LINK}", "37 % is not in"),
        (f"<!-- figures: {FILE}#against_trl -->\n\n4.6 times {LINK}\n\n5 s", "no comment says"),
        ("<!-- figures: benchmarks/results/none.json -->\n\n1 s", "no such file as"),
        ("<!-- table: none, from benchmarks/results/none.json -->\n\n| 1 s |", "no such file as"),
    ],
)
def test_figures_without_a_source_are_found(page: str, wrong: str) -> None:
    (found,) = problems(page)
    assert wrong in found


@pytest.mark.parametrize(
    "page",
    [
        f"<!-- figures: {FILE}#against_trl; 11 -->\n\n11, 36% and 6e-05, 24 {LINK}",
        f"<!-- figures: {FILE}#summary/TRL -->\n\n16.4 s and 3,325 MiB or 3.2 GiB {LINK}",
        "<!-- not measured: set so -->\n\nup to 1 GiB",
        "`5 s`, [a](b-5%20s), 8B, bf16, 128 × 64, 3 steps\n\n```\n5 s\n```",
    ],
)
def test_figures_with_a_source_are_let_be(page: str) -> None:
    assert problems(page) == []


def test_a_table_that_was_changed_by_hand_is_made_anew() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(page.replace("| 0.952 |", "| 0.953 |")) == page


def test_the_memory_of_large_vocabularies() -> None:
    points = json.loads((RESULTS / "bench-cpu.json").read_text())["points"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
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
    assert len(measured) == 11 and all(found["agree"] == 1 for found in measured)
