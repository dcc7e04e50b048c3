"""Update the tables of measurements in README and docs, and the pictures of the reproductions.

    python -m benchmarks.tables        # after a benchmark has been run again

The comment `<!-- table: NAME, from benchmarks/results/FILE.json -->` on a page is followed by the
table that `TABLES[NAME]` makes of the file. `<!-- not measured: the setting of NAME -->`, or `the
caption of NAME`, is followed by that text of a reproduction.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    architectures,
    distillation,
    reward_model,
    startup,
    trl_first_step,
    trunk,
)
from benchmarks.calibration import tables as calibration
from benchmarks.loops import report as loops
from benchmarks.peer_suites import suite, trl
from benchmarks.plans import examples
from benchmarks.real_model.tables import objectives_table, trl_table
from benchmarks.rounds import demo as rounds_demo
from benchmarks.rounds import real_model as rounds_model
from fastpref import reproduce
from fastpref.docgen import markdown
from fastpref.plan.devices import Device
from fastpref.reproduce import results
from fastpref.reproduce.study import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_STUDY_TEXT = re.compile(
    r"(<!-- not measured: the (setting|caption) of (\w+) -->\n\n)(?:[^\n<|!*].*\n)*\n?"
)
_TABLE = re.compile(r"(<!-- table: (\S+), from (\S+) -->\n\n)(?:\|.*\n)*\n?")


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """Replace the tables and study texts of a page. Raises KeyError for an unknown table."""

    def new_table(match: re.Match[str]) -> str:
        marker, name, file = match.groups()
        return f"{marker}{TABLES[name](json.loads((ROOT / file).read_text()))}\n\n"

    def study_text(match: re.Match[str]) -> str:
        marker, part, name = match.groups()
        return (
            f"{marker}{textwrap.fill(getattr(load(name), part), 100, break_on_hyphens=False)}\n\n"
        )

    return _STUDY_TEXT.sub(study_text, _TABLE.sub(new_table, text)).rstrip("\n") + "\n"


def demo(result: Any) -> str:
    columns = ("accuracy", "mean KL to p (nats)", "PCI", "change of log-prob, chosen", "rejected")
    digits = {
        **dict.fromkeys(("accuracy", "mean_kl", "pci"), ".3f"),
        **dict.fromkeys(("chosen_change", "rejected_change"), "+.2f"),
    }
    titles = {"sft": "SFT", "dpo": "DPO, β 0.1", "pmo": "PMO, α 0.9, β 0.1"}
    rows = {
        title: [_minus(f"{result[stage][name]:{form}}") for name, form in digits.items()]
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


def bench(result: Any) -> str:
    """Time and memory of log-probs and of DPO; a dash for a missing measurement."""
    points = {
        (p["op"], p["implementation"], p["head"], p["T"], p["D"], p["V"]): p
        for p in result["points"]
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


END_TO_END = {
    "fastpref": "fastpref",
    "fastpref, transformers' layers": "fastpref, layers of transformers",
    "TRL": "TRL, its defaults",
}
LOSSES_IN_TRL = {
    "TRL": "TRL's",
    "TRL, fastpref's loss": "fastpref's, by `fused(DPOTrainer)`",
    "TRL, liger's loss": "liger-kernel's `LigerFusedLinearDPOLoss`",
}


def end_to_end(result: Any, titles: dict[str, str]) -> str:
    rows = {}
    for name, title in titles.items():
        row = result["summary"][name]
        memory = [f"{row[part]:,.0f} MiB" for part in ("peak_mib", "net_mib")]
        rows[title] = [f"{row['seconds'][0]:.1f} s", f"{row['pairs_per_second']:.2f}", *memory]
    return _table(("", "step", "pairs/s", "peak", "net"), rows)


def plan_check(result: Any) -> str:
    rows = {}
    for row in result["rows"]:
        sizes = [_mib(row[f"{name}_bytes"]) for name in ("predicted", "measured")]
        rows[row["name"]] = [row["moment"], *sizes, _minus(f"{row['error']:+.1%}")]
    return _table(("config", "fullest moment", "predicted", "measured", "error"), rows)


def hardware_plans(result: Any) -> str:
    """Predictions by config; a CPU's memory and speed are left out, since machines differ."""
    rows = {}
    for plan in result["plans"]:
        device = Device(**plan["device"])
        gpu = [f"{device.usable / 2**30:.1f} GiB", f"{plan['seconds']:.1f} s"]
        rows[f"`{plan['config']}`"] = [
            f"{plan['ranks']} × {device.name}",
            f"{plan['total_bytes'] / 2**30:.1f} GiB",
            *(["–", "–"] if device.is_cpu else gpu),
        ]
    return _table(("config", "devices", "peak", "a run can use", "time a step"), rows)


def faults(result: Any) -> str:
    """Steps, rows and bits lost by trainings that were killed and resumed."""
    columns = ("kills", "trainings", "steps_lost", "rows_replayed", "rows_skipped",
               "differing_lines", "differing_bits")  # fmt: skip
    rows = {
        name.replace("ranks 1", "one process").replace("ranks 2", "two ranks"): [
            f"{result[name][column]:,}" for column in columns
        ]
        for name in sorted(result)
        if name.startswith("ranks")
    }
    return _table(("ended", *(column.replace("_", " ") for column in columns)), rows)


GPU_COLUMNS = {
    ("linear_logps", "frozen"): "head frozen",
    ("linear_logps", "trained"): "trained",
    ("forward", "frozen"): "no gradient",
}


def gpu_heads(points: list[Any]) -> str:
    """Milliseconds, ratio to the GEMM baseline of the same run, and memory, at the first shape."""
    shape = {key: points[0][key] for key in "TDV"}
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for p in points:
        if "seconds" in p and {key: p[key] for key in "TDV"} == shape:
            median, over = p["seconds"]["median"], (p["over_yardstick"] or {}).get("median")
            cell = f"{1000 * median:.1f} ms"
            if not p["implementation"].startswith("gemm"):
                cell += f", {over:.2f} ×, {_mib(p['extra_bytes'])}"
            cells.setdefault(p["implementation"], {})[p["op"], p["head"]] = cell
    rows = {
        name: [row.get(column, "–") for column in GPU_COLUMNS]
        for name, row in sorted(cells.items(), key=lambda item: not item[0].startswith("gemm"))
        if set(row) & set(GPU_COLUMNS)
    }
    return _table(("", *GPU_COLUMNS.values()), rows)


def gpu_suite(result: Any) -> str:
    rows = result["sections"]["targets"]["rows"]
    return gpu_heads([point for row in rows for point in row.get("points", ())])


def load_figures(result: Any) -> str:
    """Time and memory of large inputs and long runs."""
    few, many = result["rows"]["few"], result["rows"]["many"]
    long, groups, steps = result["long"], result["groups"], result["steps"]
    before, after = steps["second_tenth"], steps["last_tenth"]

    def mib(number: float) -> str:
        return f"{number:,.0f} MiB"

    rows = {
        f"{many['groups']:,} pairs, {many['tokens'] / 1e6:.0f} million tokens": [
            f"tokenized and planned in {many['seconds']:.0f} s",
            f"{mib(many['peak_mib'])}; {mib(few['peak_mib'])} for {few['groups']:,} pairs",
        ],
        f"{long['responses']} responses of 32k tokens": [
            f"three steps in {long['training_seconds']:.0f} s",
            mib(long["training_peak_mib"]),
        ],
        f"{groups['groups']:,} groups of 16 responses": [
            f"tokenized and planned in {groups['seconds']:.0f} s, "
            f"one epoch in {groups['training_seconds']:.0f} s",
            mib(groups["training_peak_mib"]),
        ],
        f"{steps['steps']:,} steps, {steps['steps'] // 1000} thousand lines of metrics": [
            f"{before['step_ms']:.1f} ms a step in the second tenth, {after['step_ms']:.1f} ms in "
            f"the last; report in {steps['report_seconds']:.0f} s",
            f"{mib(before['memory_mib'])} in the second tenth, {mib(after['memory_mib'])} in the "
            f"last; {before['open_files']:.0f} open files in both",
        ],
    }
    return _table(("", "time", "memory"), rows)


TABLES: dict[str, Callable[[Any], str]] = {
    "architectures": architectures.table,
    "demo": demo,
    "bench": bench,
    "end-to-end": partial(end_to_end, titles=END_TO_END),
    "losses-in-trl": partial(end_to_end, titles=LOSSES_IN_TRL),
    "plan-check": plan_check,
    "hardware-plans": hardware_plans,
    "paper-configs": lambda result: examples.table(result, "papers"),
    "recipe-configs": lambda result: examples.table(result, "recipes"),
    "h100": lambda result: gpu_heads(result["points"]),
    "h100-suite": gpu_suite,
    "load": load_figures,
    "faults": faults,
    "trunk": trunk.table,
    "startup": startup.table,
    "distillation": distillation.table,
    "loops": loops.table,
    "peer-suites-liger": suite.table,
    "peer-suites-cce": suite.table,
    "peer-suites-trl": trl.table,
    "trl-first-step": trl_first_step.table,
    "reward-model": reward_model.table,
    "rounds-demo": rounds_demo.demo_table,
    "rounds-tuning": rounds_demo.tuning_table,
    "rounds-model": rounds_model.model_table,
    "real-model-objectives": objectives_table,
    "real-model-trl": trl_table,
    "calibration-band": lambda result: calibration.tables(result["training"])[0],
    "calibration-outcome": lambda result: calibration.tables(result["training"])[1],
    "calibration-one-step": lambda result: calibration.tables(result["training"])[2],
    "calibration-overhead": lambda result: calibration.overhead_table(result["overhead"]),
    "calibration-sketch": lambda result: calibration.sketch_table(result["sketch"]),
    **{f"reproduce-{name}-claims": results.verdicts for name in reproduce.NAMES},
    **{f"reproduce-{name}-runs": partial(results.numbers, load(name)) for name in reproduce.NAMES},
}


def _table(columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    return markdown.table(columns, ([title, *cells] for title, cells in rows.items()))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _minus(number: str) -> str:
    return number.replace("-", "−")


if __name__ == "__main__":
    main()
