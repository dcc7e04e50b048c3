"""Report of the comparison: speeds, memory, loss curves, a table, a file."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.end_to_end.presets import OURS, PEER, Preset, Row, Values
from fastpref.utils import result_json
from fastpref.utils.atomic_files import replacing

# Factor on TRL's pairs/s, and share of its peak memory.
TARGETS = {"cpu": (4.0, 0.40), "cuda": (2.0, 0.60)}
SAME_CURVE = 1e-3  # largest difference of the losses of a step


def summary(preset: Preset, rows: dict[str, Row], response_tokens: list[int]) -> Values:
    """Speed and memory of each contestant that finished, and of fastpref relative to TRL.

    Speeds cover the steps after `warm_up` that all contestants took, and so the same pairs: pairs
    and response tokens over the median step. `times` is the median over these steps of TRL's
    seconds over the contestant's. Memory is that of the process; `net` excludes libraries, policy
    and data.
    """
    finished = {name: row for name, row in rows.items() if "peak_bytes" in row}
    if not finished:
        return {"summary": {}}
    common = slice(preset.warm_up, min(len(row["seconds"]) for row in finished.values()))
    tokens = statistics.fmean(response_tokens[common])
    peer = finished.get(PEER)
    speeds: dict[str, Values] = {}
    for name, row in finished.items():
        seconds = row["seconds"][common]
        median = statistics.median(seconds)
        speeds[name] = {
            "seconds": [median, min(seconds), max(seconds)],
            "pairs_per_second": preset.batch_size / median,
            "response_tokens_per_second": tokens / median,
            "peak_mib": row["peak_bytes"] / 2**20,
            "net_mib": row["net_bytes"] / 2**20,
            "setup_seconds": row["setup_seconds"],
        }
        if peer is not None:
            steps = zip(peer["seconds"][common], seconds, strict=True)
            speeds[name]["times"] = statistics.median(trl / ours for trl, ours in steps)
    report: Values = {"summary": speeds, "timed_steps": [common.start, common.stop]}
    if peer is not None and OURS in finished:
        report["against_trl"] = _against(preset, finished[OURS], peer, speeds)
    return report


def _against(preset: Preset, ours: Row, peer: Row, speeds: dict[str, Values]) -> Values:
    speed, memory = TARGETS[preset.device]
    gaps = [abs(a - b) for a, b in zip(ours["loss"], peer["loss"], strict=False)]
    peak = speeds[OURS]["peak_mib"] / speeds[PEER]["peak_mib"]
    return {
        "times_its_pairs_per_second": speeds[OURS]["times"],
        "share_of_its_peak": peak,
        "share_of_its_net_peak": speeds[OURS]["net_mib"] / speeds[PEER]["net_mib"],
        "largest_difference_of_losses": max(gaps),
        "steps_compared": len(gaps),
        "rewards_of_the_first_step": {
            name: [row["rewards/chosen"][0], row["rewards/rejected"][0]]
            for name, row in ((OURS, ours), (PEER, peer))
        },
        "targets": {
            f"{speed:g} times its pairs per second": speeds[OURS]["times"] >= speed,
            f"{memory:.0%} of its peak": peak <= memory,
            f"losses within {SAME_CURVE:g}": max(gaps) <= SAME_CURVE,
        },
    }


def table(report: Values) -> list[str]:
    """Lines for a terminal."""
    titles = f"{'s a step':>22}{'pairs/s':>9}{'tokens/s':>10}{'times':>7}{'peak':>9}{'net MiB':>9}"
    lines = [f"{'':28}{titles}"]
    for name, row in report["contestants"].items():
        if name not in report["summary"]:
            why = row.get("failed") or row.get("unsupported") or "not run"
            lines.append(f"{name:28}{why}")
            continue
        s = report["summary"][name]
        median, least, most = s["seconds"]
        lines.append(
            f"{name:28}{f'{median:.2f} ({least:.2f} to {most:.2f})':>22}"
            f"{s['pairs_per_second']:9.2f}{s['response_tokens_per_second']:10,.0f}"
            f"{s.get('times', float('nan')):7.2f}{s['peak_mib']:9,.0f}{s['net_mib']:9,.0f}"
        )
    if floor := report.get("floor"):
        least, most = (floor[f"{what}_recomputed_seconds"] for what in ("nothing", "everything"))
        title = "matrix products of a step"
        lines.append(f"{title:28}{f'{least:.2f}':>22}   everything recomputed {most:.2f}")
    for name, value in report.get("against_trl", {}).items():
        lines.append(f"{name}: {value}")
    return lines


def write(path: Path, report: Values) -> None:
    with replacing(path) as temporary:
        temporary.write_text(result_json.dumps(report))
