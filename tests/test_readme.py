"""Numbers in the README are those of the result files that it names."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_demo_table() -> None:
    results = json.loads((ROOT / "benchmarks/results/demo-cpu.json").read_text())
    for stage in ("sft", "dpo", "pmo"):
        values = results[stage]
        cells = [f"{values[name]:.3f}" for name in ("accuracy", "mean_kl", "pci")]
        cells += [f"{values[name]:+.2f}" for name in ("chosen_change", "rejected_change")]
        row = " | ".join(cells).replace("-", "−")
        assert re.search(rf"\| {stage.upper()}[^|]*\| {re.escape(row)} \|", README), row


BENCH = json.loads((ROOT / "benchmarks/results/bench-cpu.json").read_text())["points"]
COLUMNS = [("frozen", 2048), ("trained", 2048), ("frozen", 1024), ("trained", 1024)]


def point(op: str, name: str, head: str, **sizes: int) -> dict[str, Any] | None:
    for p in BENCH:
        wanted = {"op": op, "implementation": name, "head": head, **sizes}
        if "seconds" in p and all(p[key] == value for key, value in wanted.items()):
            return p
    return None


@pytest.mark.parametrize(
    ("label", "op", "name"),
    [
        ("fastpref", "linear_logps", "fastpref cpu"),
        ("fastpref, no cache", "linear_logps", "fastpref cpu, no cache"),
        ("fastpref, 4 MiB chunks, no cache", "linear_logps", "fastpref cpu, least memory"),
        ("full logits", "linear_logps", "torch full logits"),
        ("`F.linear_cross_entropy`", "linear_logps", "torch linear_cross_entropy"),
        ("TRL chunked", "linear_logps", "trl chunked log-prob"),
        ("DPO: fastpref", "dpo", "fastpref cpu"),
        ("DPO: liger-kernel", "dpo", "liger DPO, eager"),
    ],
)
def test_the_table_of_times(label: str, op: str, name: str) -> None:
    cells = []
    for head, tokens in COLUMNS:
        p = point(op, name, head, T=tokens, D=512 if tokens == 2048 else 256)
        memory = "" if p is None or p["extra_bytes"] is None else p["extra_bytes"] / 2**20
        size = f", {memory:,.0f} MiB" if memory else ""
        cells.append("–" if p is None else f"{p['seconds']['median']:.2f} s{size}")
    assert f"| {label} | {' | '.join(cells)} |" in README


def test_the_memory_figures() -> None:
    text = " ".join(README.split())
    for name, words in (
        ("fastpref cpu", "it is {:.0f} MiB at V 32,768 and {:.0f} MiB at V 262,144"),
        ("torch full logits", "full logits take {:,.0f} and {:,.0f} MiB"),
    ):
        points = [point("linear_logps", name, "frozen", T=1024, V=V) for V in (32768, 262144)]
        assert words.format(*(p["extra_bytes"] / 2**20 for p in points if p)) in text


def test_the_tables_of_calibration() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import calibration
    finally:
        sys.path.pop(0)
    found = json.loads((ROOT / "benchmarks/results/calibration.json").read_text())
    text = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    tables = *calibration.tables(found["training"]), calibration.overhead_table(found["overhead"])
    assert [table for table in tables if table not in text] == []
    assert all(
        run["one_step"]["agree"] == 1 for run in found["training"]["runs"] if "one_step" in run
    )


END_TO_END = json.loads((ROOT / "benchmarks/results/end-to-end-cpu.json").read_text())


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("fastpref", "fastpref"),
        ("fastpref, its defaults", "fastpref, defaults"),
        ("TRL, its defaults", "TRL"),
        ("TRL, reference precomputed", "TRL, reference precomputed"),
    ],
)
def test_the_table_of_whole_steps(label: str, name: str) -> None:
    found = END_TO_END["summary"][name]
    speed = f"{found['seconds'][0]:.1f} s | {found['pairs_per_second']:.2f}"
    row = f"| {label} | {speed} | {found['peak_mib']:,.0f} MiB | {found['net_mib']:,.0f} MiB |"
    assert row in README


def test_what_is_said_of_whole_steps() -> None:
    against = END_TO_END["against_trl"]
    assert f"{against['times_its_pairs_per_second']:.1f} times as fast as TRL" in README
    assert f"with {against['share_of_its_peak']:.0%} of its peak" in README
    assert f"differ by {against['largest_difference_of_losses']:.0e} at most" in README
