"""Report page and chart files, written once or whenever the runs log new metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastpref.report import dynamics_charts, preference_charts, rounds, samples, style, tables
from fastpref.report.chart import ChartSpec
from fastpref.report.line_charts import LineChart
from fastpref.report.runs import Run, load, run_folders
from fastpref.utils import atomic_files
from fastpref.utils.progress import Display

MAX_RUNS = len(style.COLORS)  # in the charts; tables have all runs
REFRESH = 5  # seconds between checks of the metrics files, and between reloads of the page
_BAND = "band/{name} (monitor.band_every, or calibration)"
_P = "eval_preference/{name} (data.eval with a column p)"
CHARTS = (
    ChartSpec("loss", "Loss", LineChart("loss", "loss", "loss (mean per pair)").draw, "loss"),
    ChartSpec(
        "accuracy",
        "Accuracy",
        LineChart("accuracy", "rewards/accuracies", "pairs ranked correctly (fraction)").draw,
        "rewards/accuracies",
    ),
    ChartSpec(
        "margins",
        "Margin of the rewards",
        LineChart("margin", "rewards/margins", "chosen − rejected (β · nats)").draw,
        "rewards/margins (pairs, or responses of both classes)",
    ),
    ChartSpec(
        "logps",
        "Chosen and rejected log-probs and their pathway",
        dynamics_charts.logps,
        "logps/chosen and logps/rejected in all runs",
    ),
    ChartSpec("band", "Disentanglement Band", dynamics_charts.band, _BAND.format(name="log_r")),
    ChartSpec(
        "pair-pathways",
        "Pathways of the pairs",
        dynamics_charts.pair_pathways,
        "pair_band/inside (monitor.band_every, or calibration.statistics: pairs)",
    ),
    ChartSpec(
        "cosine",
        "Cosine of the scores",
        LineChart("cosine", "band/cosine", "cosine (no unit)").draw,
        _BAND.format(name="cosine"),
    ),
    ChartSpec(
        "contrast",
        "Contrastive logits",
        preference_charts.contrast,
        "eval_contrast/histogram (data.eval with pairs)",
    ),
    ChartSpec(
        "calibration",
        "Calibration of preferences",
        preference_charts.calibration,
        _P.format(name="calibration"),
    ),
    ChartSpec(
        "trade-off",
        "KL, accuracy and preference collapse",
        preference_charts.trade_off,
        _P.format(name="mean_kl"),
    ),
    ChartSpec(
        "reward",
        "Reward of the samples",
        LineChart("reward", "reward", "reward (mean per response)").draw,
        "reward (loss: ppo or grpo)",
    ),
    ChartSpec(
        "kl",
        "KL to the reference",
        LineChart("KL", "kl", "KL (nats per response)", "nats").draw,
        "kl (loss: ppo or grpo, with a KL penalty)",
    ),
    ChartSpec(
        "clipping",
        "Clipped tokens",
        LineChart("clipped share", "clip_share", "clipped tokens (fraction)").draw,
        "clip_share (loss: ppo or grpo)",
    ),
    ChartSpec(
        "entropy",
        "Entropy",
        LineChart("entropy", "entropy", "entropy (nats per token)", "nats per token").draw,
        "entropy",
    ),
    ChartSpec(
        "lengths",
        "Response lengths",
        LineChart("length", "lengths/{side}", "length (tokens)", "tokens", held_out=False).draw,
        "lengths/chosen and lengths/rejected",
    ),
    ChartSpec(
        "speed",
        "Speed",
        LineChart("speed", "tokens_per_second", "tokens per second", "tokens per second").draw,
        "tokens_per_second",
    ),
    ChartSpec(
        "memory",
        "Memory",
        LineChart("peak memory", "peak_memory_gib", "peak memory (GiB)", "GiB").draw,
        "peak_memory_gib",
    ),
    ChartSpec(
        "grad-norm",
        "Gradient norm",
        LineChart("gradient norm", "grad_norm", "norm before clipping (no unit)", log=True).draw,
        "grad_norm",
    ),
)


class RenderedChart(NamedTuple):
    """Chart of a page with its reading and its inline SVG."""

    spec: ChartSpec
    reading: str
    svg: str


def report(paths: Sequence[Path], out: Path | None, watch: bool, display: Display) -> Path:
    """Write the report page of some runs and return its path.

    paths: run directories, and folders of such.
    out: folder for report.html and for report/, the chart files; None means the folder if there is
        one, or `report` for several.
    watch: rewrite the page whenever a run logs new metrics or a new run begins, until Ctrl-C.
    Raises UserError for a folder that is neither.
    """
    if out is None:
        out = paths[0] if len(paths) == 1 else Path("report")
    runs = load(run_folders(paths))
    page = write(runs, out, refresh=watch)
    display.note(f"report: {page}")
    if selection := _charted(runs)[1]:
        display.note(selection)
    if watch:
        try:
            _watch(paths, out)
        except KeyboardInterrupt:
            display.note("stopped watching")
        write(load(run_folders(paths)), out)
    return page


def write(runs: Sequence[Run], out: Path, refresh: bool = False) -> Path:
    """Write `out/report.html`, and `out/report/` with a PNG and an SVG of each chart."""
    charts_folder = out / "report"
    charts_folder.mkdir(parents=True, exist_ok=True)
    charted, _ = _charted(runs)
    rendered, missing = [], []
    for spec in (*([rounds.CHART] if any(run.rounds for run in runs) else []), *CHARTS):
        with style.settings(spec.name):
            chart = spec.draw(charted)
            if chart is None:
                missing.append(spec)
                continue
            svg = style.write(chart.figure, charts_folder / spec.name)
        rendered.append(RenderedChart(spec, chart.reading, svg))
    page = out / "report.html"
    with atomic_files.replacing(page) as temporary:
        temporary.write_text(html(runs, rendered, missing, refresh), encoding="utf-8")
    return page


def _charted(runs: Sequence[Run]) -> tuple[Sequence[Run], str]:
    """Return the runs that the charts show, and a sentence about them if these are not all."""
    if len(runs) <= MAX_RUNS:
        return runs, ""
    charted, measure = tables.foremost(runs, MAX_RUNS)
    choice = f"those with the best {measure}" if measure else "the first ones"
    return charted, f"The charts show {len(charted)} of the {len(runs)} runs: {choice}."


def html(
    runs: Sequence[Run],
    charts: Sequence[RenderedChart],
    missing: Sequence[ChartSpec],
    refresh: bool,
) -> str:
    """HTML of the page; all text is escaped except the SVGs, which matplotlib has escaped."""
    environment = Environment(
        loader=PackageLoader("fastpref.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charted, selection = _charted(runs)
    values: dict[str, Any] = {
        "runs": runs,
        "colors": {run.name: style.color(k) for k, run in enumerate(charted)},
        "selection": selection,
        "charts": charts,
        "missing": missing,
        "metrics": tables.final_metrics(runs),
        "differences": tables.differences(runs),
        "round_tables": rounds.round_tables(runs),
        "sample_tables": samples.sample_tables(runs),
        "refresh": REFRESH if refresh else None,
    }
    return environment.get_template("report.html").render(values)


def _watch(paths: Sequence[Path], out: Path) -> None:
    """Rewrite the page whenever a metrics file has changed or is new, until Ctrl-C."""
    previous = _file_versions(run_folders(paths))
    while True:
        time.sleep(REFRESH)
        folders = run_folders(paths)
        current = _file_versions(folders)
        if current != previous:
            write(load(folders), out, refresh=True)
            previous = current


def _file_versions(folders: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Modification time and size of each metrics file."""
    stats = {folder: (folder / "metrics.jsonl").stat() for folder in folders}
    return {folder: (stat.st_mtime_ns, stat.st_size) for folder, stat in stats.items()}
