"""Report page: contents, escaping, self-containment, updates, and display in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastpref.report import page, report
from fastpref.utils.progress import Display
from tests.helpers.report_runs import evaluated, full, run, trained, with_band, write

EVIL = "<script>alert(1)"


def made(*runs: Any, out: Path) -> str:
    return page.write(runs, out).read_text()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Page of two runs whose names and configs contain markup."""
    out = tmp_path_factory.mktemp("report")
    data = {"train": "<script>x()</script>.jsonl", "cache": '"><img src=x onerror=alert(2)>'}
    runs = full(EVIL, data=data), full("b & c", loss={"name": "ipo"}, model={"path": "<b>m</b>"})
    return page.write(runs, out)


def test_a_page_has_every_chart_and_its_files(two_runs: Path) -> None:
    text = two_runs.read_text()
    assert text.count("<svg") == text.count("<figure>") == len(page.CHARTS)
    for spec in page.CHARTS:
        assert f"<h3>{spec.title}</h3>" in text
        for ending in ("png", "svg"):
            assert f'href="report/{spec.name}.{ending}"' in text
            assert (two_runs.parent / "report" / f"{spec.name}.{ending}").stat().st_size > 1000
    assert "Charts without data" not in text and "http-equiv" not in text


def test_what_comes_from_runs_is_escaped(two_runs: Path) -> None:
    text = two_runs.read_text()
    assert "<script" not in text and "<img" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;m&lt;/b&gt;" in text
    assert "b &amp; c: " in text  # in a reading


def test_a_page_needs_nothing_but_itself(two_runs: Path) -> None:
    text = two_runs.read_text()
    links: list[str] = re.findall(r"url\(([^)]*)\)", text)
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: links.extend(  # type: ignore[method-assign]
        str(value) for name, value in attributes if name in ("src", "href", "xlink:href")
    )
    parser.feed(text)
    assert links and all(link.startswith(("report/", "#")) for link in links)
    assert "@import" not in text and "prefers-color-scheme: dark" in text


def test_configs_stand_side_by_side(two_runs: Path) -> None:
    text = two_runs.read_text()
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', text)
    assert ("loss.name", "dpo", "ipo") in rows
    assert ("model.path", "m", "&lt;b&gt;m&lt;/b&gt;") in rows


def test_a_chart_without_data_is_named_with_what_it_needs(tmp_path: Path) -> None:
    text = made(run([trained(1), trained(2)]), out=tmp_path)
    assert "Disentanglement Band: needs band/log_r (monitor.band_every, or" in text
    assert "Calibration of preferences: needs eval_preference/calibration (data.eval with" in text
    assert not (tmp_path / "report" / "band.png").exists()
    assert text.count("<figure>") == len(page.CHARTS) - text.count(": needs ")


def test_long_runs_make_no_long_page(tmp_path: Path) -> None:
    text = made(run([with_band(step) for step in range(1, 12_001)]), out=tmp_path)
    assert len(text) < 2_000_000
    assert "step 12,000" in text


def test_where_a_page_goes(tmp_path: Path, display: Display, monkeypatch: Any) -> None:
    one, two = (write(tmp_path / name, full(name)) for name in "ab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    assert report([one], None, False, display) == one / "report.html"
    assert report([one, two], None, False, display) == Path("report/report.html")
    assert report([one], tmp_path / "new" / "out", False, display).exists()
    assert (one / "report" / "loss.svg").exists()
    assert report([tmp_path], None, False, display) == tmp_path / "report.html"
    assert "<strong>b</strong>" in (tmp_path / "report.html").read_text()


def test_more_runs_than_colors_are_all_in_the_tables(
    tmp_path: Path, display: Display, monkeypatch: Any
) -> None:
    for k in range(10):
        lines = [{**trained(1), "rewards/accuracies": k / 10}]
        write(tmp_path / f"run-{k}", run(lines))
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    text = report([tmp_path], None, False, display).read_text()
    sentence = "The charts show 8 of the 10 runs: those with the best accuracy of rewards."
    assert sentence in text
    assert all(
        f"<strong>run-{k}</strong>" in text and f"<th>run-{k}</th>" in text for k in range(10)
    )
    (figure,) = re.findall(r"<figure>(.*?)</figure>", text, re.S)
    charted = [f"run-{k}" in figure for k in range(10)]
    assert charted == [False, False, *[True] * 8]
    assert text.count('class="swatch"') == 8


def test_watching_writes_again_when_a_run_goes_on(
    tmp_path: Path, display: Display, monkeypatch: Any
) -> None:
    folder = write(tmp_path / "a", run([trained(1)]))
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        seen.append((folder / "report.html").read_text())
        if len(seen) == 2:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(trained(2)) + "\n")
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(page.time, "sleep", sleep)
    report([folder], None, True, display)
    refreshing = f'<meta http-equiv="refresh" content="{page.REFRESH}">'
    assert all(refreshing in text for text in seen)
    assert ["at step 1\n" in text for text in seen] == [True, True, False, False]
    final = (folder / "report.html").read_text()
    assert refreshing not in final and "at step 2\n" in final


def test_watching_a_grid_adds_runs_that_begin(
    tmp_path: Path, display: Display, monkeypatch: Any
) -> None:
    write(tmp_path / "a", run([trained(1)]))
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        seen.append((tmp_path / "report.html").read_text())
        if len(seen) == 1:
            write(tmp_path / "b", run([trained(1)]))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(page.time, "sleep", sleep)
    report([tmp_path], None, True, display)
    assert ["<strong>b</strong>" in text for text in seen] == [False, True]


def test_the_command(fastpref: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", run([trained(1), evaluated(1)]))
    done = fastpref("report", str(folder))
    assert (done.returncode, done.stdout) == (0, f"report: {folder}/report.html\n"), done.stderr
    done = fastpref("report", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"report: {tmp_path}/report.html\n"), done.stderr
    done = fastpref("report", str(folder / "report"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}/report: not a run directory")
    assert len(done.stderr.splitlines()) == 1


def test_a_browser_shows_it_without_an_error(two_runs: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--dump-dom", two_runs.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<figure>") == len(page.CHARTS)
    assert "&lt;script&gt;alert(1)" in done.stdout and "<script" not in done.stdout
    assert "Chosen and rejected log-probs" in done.stdout
