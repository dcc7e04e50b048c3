"""The site builds and loads nothing from the network, and the commands on its pages work."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from benchmarks.plans import by_hardware
from fastpref import cli, config, losses
from fastpref.data import sft
from fastpref.data.formats import to_groups
from tests.helpers.data import rows, write_jsonl

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site of a strict build, which fails on a broken link or a page that is not in the nav."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


class Resources(HTMLParser):
    """Addresses that a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get("href") if tag == "link" else values.get("src")
        self.addresses += [address] if address else []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the site with")
def test_the_search_finds_pages_opened_from_the_disk(site: Path, tmp_path: Path) -> None:
    options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
    done = subprocess.run(
        [
            str(CHROMIUM),
            *options.split(),
            f"--user-data-dir={tmp_path}",
            f"{(site / 'config.html').as_uri()}?q=warmup_steps",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(r"\d+ matching documents", done.stdout)
    assert f'href="{(site / "config.html").as_uri()}" class="md-search-result__link"' in done.stdout


def test_the_search_needs_no_server_and_no_network(site: Path) -> None:
    assert (site / "search" / "search_index.js").read_text("utf-8").startswith("var __index = {")
    for page in (site / "index.html", *site.glob("repository/*/index.html")):
        (address,) = re.findall(r'<script src="([^"]*iframe-worker.js)"', page.read_text("utf-8"))
        assert (page.parent / address).is_file()


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    # Only a server shows 404.html, whose addresses begin at its root.
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 15
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert len(resources.addresses) > 3
        for address in resources.addresses:
            assert "//" not in address, (page.name, address)
            assert address.startswith("data:") or (page.parent / address.split("?")[0]).exists()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8"))


def fenced(page: str, language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    return [text for block_language, text in blocks if block_language == language]


@pytest.mark.parametrize("line", fenced("quick-start.md", "json"))
def test_the_rows_of_the_quick_start_are_data(line: str) -> None:
    row = json.loads(line)
    if "messages" in row:
        assert len(sft.to_group(row).responses) == 1
        return
    column = next(name for name in ("completions", "completion", "chosen") if name in row)
    kinds = {"completions": "groupwise", "completion": "pointwise", "chosen": "pairwise"}
    (group,) = to_groups(row, kinds[column])
    assert len(group.responses) == {"completions": 3, "completion": 1, "chosen": 2}[column]


def test_the_quick_start_works(
    tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs after the demo; here with a smaller model, fewer pairs and fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_llama, "runs/demo/sft/model")
    Path("runs/demo/data").mkdir()
    for name in ("train", "test"):
        write_jsonl(Path(f"runs/demo/data/{name}.jsonl"), rows(24, soft=True))
    (text,) = fenced("quick-start.md", "yaml")
    Path("first.yaml").write_text(text.replace("steps: 20", "steps: 3"))
    commands = "".join(fenced("quick-start.md")).replace("--step 20", "--step 3").splitlines()
    lines = [line for line in commands if line.startswith("fastpref ")]
    assert len(lines) == 8 and text.startswith("# first.yaml") and "steps: 20" in text
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (None, 0), line
    for output in ("compare/report.html", "eval.json", "drawn.jsonl", "at-20/model.safetensors"):
        assert Path(output).stat().st_size > 100
    Path("load.py").write_text(*fenced("quick-start.md", "python"))
    runpy.run_path("load.py")


PLANS = json.loads(by_hardware.RESULT.read_text())["plans"]


def test_every_config_by_hardware_is_planned_as_it_stands() -> None:
    texts, commands = by_hardware.configs(), by_hardware.commands()
    assert list(texts) == list(commands) == [plan["config"] for plan in PLANS]
    for plan in PLANS:
        assert plan["text"] == texts[plan["config"]], "run: python -m benchmarks.plans.by_hardware"
        assert plan["options"] == commands[plan["config"]]
        assert plan["fits"]


@pytest.mark.parametrize("text", by_hardware.configs().values(), ids=by_hardware.configs())
def test_the_configs_by_hardware_are_valid(text: str) -> None:
    parsed = config.parse(yaml.safe_load(text))
    assert parsed.model.path in by_hardware.SHAPES
    assert f"# {Path(parsed.training.output_dir).name}.yaml" == text.splitlines()[0]


def test_the_objectives_to_choose_from_exist() -> None:
    page = (DOCS / "choosing-an-objective.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| no reference: (.*?) \|", page, re.M)
    free = {name for name in losses.names() if not losses.describe(name).needs_reference}
    assert set(re.findall(r"`(\w+)`", row)) == free
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    words = set(re.findall(r"`(\w+)`", tables)) - COLUMNS_AND_OPTIONS
    assert words <= {*losses.names(), *losses.rollout_names()}


COLUMNS_AND_OPTIONS = {
    "p",
    "margin",
    "offset",
    "chosen",
    "ld_alpha",
    "chosen_weights",
    "rejected_weights",
    "desirable_weight",
    "undesirable_weight",
    "accuracy_per_token",
}
