"""The tables of measurements in README and docs, made from the result files that they name; and
the pictures of the reproductions.

    python benchmarks/tables.py        # after a benchmark has been run again

Behind `<!-- table: NAME, from benchmarks/results/FILE.json -->` on a page stands the table that
`TABLES[NAME]` makes of the file, and behind `<!-- not measured: the setting of NAME -->`, or `the
caption of`, what a reproduction says of itself.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import calibration

from fastpref import reproduce
from fastpref.estimate.devices import Device
from fastpref.reproduce import result
from fastpref.reproduce.study import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_TOLD = re.compile(
    r"(<!-- not measured: the (setting|caption) of (\w+) -->\n\n)(?:[^\n<|!*].*\n)*\n?"
)
_MARKED = re.compile(r"(<!-- table: (\S+), from (\S+) -->\n\n)(?:\|.*\n)*")


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in reproduce.NAMES:
        found = json.loads((RESULTS / "reproduce" / f"{name}.json").read_text())
        result.draw(load(name), found, ROOT / "docs" / f"reproduce-{name}.png")


def with_tables(text: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""

    def made(marked: re.Match[str]) -> str:
        marker, name, file = marked.groups()
        return f"{marker}{TABLES[name](json.loads((ROOT / file).read_text()))}\n"

    def told(marked: re.Match[str]) -> str:
        marker, part, name = marked.groups()
        return (
            f"{marker}{textwrap.fill(getattr(load(name), part), 100, break_on_hyphens=False)}\n\n"
        )

    return _TOLD.sub(told, _MARKED.sub(made, text))


def demo(found: Any) -> str:
    columns = ("accuracy", "mean KL to p (nats)", "PCI", "change of log-prob, chosen", "rejected")
    digits = {
        **dict.fromkeys(("accuracy", "mean_kl", "pci"), ".3f"),
        **dict.fromkeys(("chosen_change", "rejected_change"), "+.2f"),
    }
    titles = {"sft": "SFT", "dpo": "DPO, β 0.1", "pmo": "PMO, α 0.9, β 0.1"}
    rows = {
        title: [_minus(f"{found[stage][name]:{form}}") for name, form in digits.items()]
        for stage, title in titles.items()
    }
    return _table(("", *columns), rows)


BENCH_COLUMNS = [
    ("T 2048, D 512, V 32,000, head frozen", ("frozen", 2048, 512, 32000)),
    ("trained", ("trained", 2048, 512, 32000)),
    ("T 1024, D 256, V 128,256, frozen", ("frozen", 1024, 256, 128256)),
    ("trained", ("trained", 1024, 256, 128256)),
]
BENCH_ROWS = {
    "fastpref": ("linear_logps", "fastpref cpu"),
    "fastpref, no cache": ("linear_logps", "fastpref cpu, no cache"),
    "fastpref, 4 MiB chunks, no cache": ("linear_logps", "fastpref cpu, least memory"),
    "full logits": ("linear_logps", "torch full logits"),
    "`F.linear_cross_entropy`": ("linear_logps", "torch linear_cross_entropy"),
    "TRL chunked": ("linear_logps", "trl chunked log-prob"),
    "DPO: fastpref": ("dpo", "fastpref cpu"),
    "DPO: liger-kernel": ("dpo", "liger DPO, eager"),
}


def bench(found: Any) -> str:
    """Time and memory of log-probs and of DPO; a dash where nothing was measured."""
    points = {
        (p["op"], p["implementation"], p["head"], p["T"], p["D"], p["V"]): p
        for p in found["points"]
        if "seconds" in p
    }

    def cell(point: Any) -> str:
        if point is None:
            return "–"
        seconds, memory = f"{point['seconds']['median']:.2f} s", point["extra_bytes"]
        return f"{seconds}, {_mib(memory)}" if memory else seconds

    rows = {
        title: [cell(points.get(op + sizes)) for _, sizes in BENCH_COLUMNS]
        for title, op in BENCH_ROWS.items()
    }
    return _table(("", *(title for title, _ in BENCH_COLUMNS)), rows)


def end_to_end(found: Any) -> str:
    titles = {
        "fastpref": "fastpref",
        "fastpref, defaults": "fastpref, its defaults",
        "TRL": "TRL, its defaults",
        "TRL, reference precomputed": "TRL, reference precomputed",
    }
    rows = {}
    for name, title in titles.items():
        row = found["summary"][name]
        memory = [f"{row[part]:,.0f} MiB" for part in ("peak_mib", "net_mib")]
        rows[title] = [f"{row['seconds'][0]:.1f} s", f"{row['pairs_per_second']:.2f}", *memory]
    return _table(("", "step", "pairs/s", "peak", "net"), rows)


def plan_check(found: Any) -> str:
    rows = {}
    for row in found["rows"]:
        sizes = [_mib(row[f"{name}_bytes"]) for name in ("predicted", "measured")]
        rows[row["name"]] = [row["moment"], *sizes, _minus(f"{row['error']:+.1%}")]
    return _table(("config", "fullest moment", "predicted", "measured", "error"), rows)


def hardware_plans(found: Any) -> str:
    """Predictions by config; what a CPU can and how fast is that of one machine, and left out."""
    rows = {}
    for plan in found["plans"]:
        device = Device(**plan["device"])
        gpu = [f"{device.usable / 2**30:.1f} GiB", f"{plan['seconds']:.1f} s"]
        rows[f"`{plan['config']}`"] = [
            f"{plan['ranks']} × {device.name}",
            f"{plan['total_bytes'] / 2**30:.1f} GiB",
            *(["–", "–"] if device.is_cpu else gpu),
        ]
    return _table(("config", "devices", "peak", "a run can use", "time a step"), rows)


def faults(found: Any) -> str:
    """What was lost of trainings that were ended so often."""
    columns = ("kills", "trainings", "steps_lost", "rows_replayed", "rows_skipped",
               "differing_lines", "differing_bits")  # fmt: skip
    rows = {
        name.replace("ranks 1", "one process").replace("ranks 2", "two ranks"): [
            f"{found[name][column]:,}" for column in columns
        ]
        for name in sorted(found)
        if name.startswith("ranks")
    }
    return _table(("ended", *(column.replace("_", " ") for column in columns)), rows)


def skipped_blocks(found: Any) -> str:
    points = sorted(found["points"], key=lambda p: (-p["threshold"], p["evidence"]))
    strengths = sorted({p["evidence"] for p in points})
    rows: dict[str, list[str]] = {}
    for p in points:
        cell = f"{100 * p['active_share']:.1f} %, {p['relative_error']:.1g}"
        rows.setdefault(_power_of_two(p["threshold"]), []).append(cell)
    first, *others = (f"evidence {strength:g}" for strength in strengths)
    return _table(("threshold", f"{first}: active, error", *others), rows)


TABLES: dict[str, Callable[[Any], str]] = {
    "demo": demo,
    "bench": bench,
    "end-to-end": end_to_end,
    "plan-check": plan_check,
    "hardware-plans": hardware_plans,
    "skipped-blocks": skipped_blocks,
    "faults": faults,
    "calibration-band": lambda found: calibration.tables(found["training"])[0],
    "calibration-outcome": lambda found: calibration.tables(found["training"])[1],
    "calibration-one-step": lambda found: calibration.tables(found["training"])[2],
    "calibration-overhead": lambda found: calibration.overhead_table(found["overhead"]),
    **{f"reproduce-{name}-claims": result.verdicts for name in reproduce.NAMES},
    **{f"reproduce-{name}-runs": partial(result.numbers, load(name)) for name in reproduce.NAMES},
}


def _table(columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [columns, *([title, *cells] for title, cells in rows.items())]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head.replace("|  |", "| |"), "|---" * len(columns) + "|", *body])


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _power_of_two(number: float) -> str:
    return "2" + str(math.frexp(number)[1] - 1).translate(_SUPERSCRIPT)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


if __name__ == "__main__":
    main()
