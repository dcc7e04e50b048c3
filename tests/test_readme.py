"""Numbers in the README are those of the result files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_the_memory_figures() -> None:
    points = json.loads((ROOT / "benchmarks/results/memory-cpu.json").read_text())["points"]
    found = {(p["impl"], p["vocabulary"]): p["extra_mib"] for p in points if p["head"] == "frozen"}
    text = " ".join(README.split())
    for impl, words in (
        ("chunked", "take {:.0f} MiB beside inputs and gradients at a vocabulary of 262,144, "
         "and {:.0f} MiB at 32,768"),
        ("full", "full logits take {:,.0f} and {:,.0f} MiB"),
    ):  # fmt: skip
        assert words.format(found[impl, 262144], found[impl, 32768]) in text
