"""The page of a report and the files of its pictures; once, or while the runs go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastpref.report import dynamics_charts, preference_charts, style, tables
from fastpref.report.chart import Picture
from fastpref.report.line_charts import Lines
from fastpref.report.runs import Run, load
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

MOST_RUNS = len(style.COLOURS)
REFRESH = 5  # seconds between looks at the files, and between reloads of the page
_BAND = "band/log_r and its neighbours (monitor.band_every, or calibration)"
_P = "eval_preference/{name} (data.eval with a column p)"
PICTURES = (
    Picture("loss", "Loss", Lines("loss", "loss (mean per pair)").draw, "loss"),
    Picture(
        "accuracy",
        "Accuracy",
        Lines("rewards/accuracies", "pairs ranked rightly (share)").draw,
        "rewards/accuracies",
    ),
    Picture(
        "margins",
        "Margin of the rewards",
        Lines("rewards/margins", "chosen − rejected (β · nats)").draw,
        "rewards/margins (pairs, or responses of both classes)",
    ),
    Picture(
        "logps",
        "Chosen and rejected log-probs, and their pathway",
        dynamics_charts.logps,
        "logps/chosen and logps/rejected in all runs",
    ),
    Picture("band", "Disentanglement Band", dynamics_charts.band, _BAND),
    Picture(
        "cosine",
        "Cosine of the scores",
        Lines("band/cosine", "cosine (no unit)").draw,
        _BAND.replace("log_r and its neighbours", "cosine"),
    ),
    Picture(
        "contrast",
        "Contrastive logits",
        preference_charts.contrast,
        "eval_contrast/histogram (data.eval with pairs)",
    ),
    Picture(
        "calibration",
        "Calibration of preferences",
        preference_charts.calibration,
        _P.format(name="calibration"),
    ),
    Picture(
        "trade-off",
        "KL, accuracy and preference collapse",
        preference_charts.trade_off,
        _P.format(name="mean_kl"),
    ),
    Picture(
        "entropy",
        "Entropy",
        Lines("entropy", "entropy (nats per token)", "nats per token").draw,
        "entropy",
    ),
    Picture(
        "lengths",
        "Response lengths",
        Lines("lengths/{side}", "length (tokens)", "tokens", held_out=False).draw,
        "lengths/chosen and lengths/rejected",
    ),
    Picture(
        "speed",
        "Speed",
        Lines("tokens_per_second", "tokens per second", "tokens per second").draw,
        "tokens_per_second",
    ),
    Picture(
        "memory",
        "Memory",
        Lines("peak_memory_gib", "peak so far (GiB)", "GiB").draw,
        "peak_memory_gib",
    ),
    Picture(
        "grad-norm",
        "Gradient norm",
        Lines("grad_norm", "norm before clipping (no unit)", log=True).draw,
        "grad_norm",
    ),
)


class Shown(NamedTuple):
    picture: Picture
    reading: str
    svg: str


def report(folders: Sequence[Path], out: Path | None, watch: bool, display: Display) -> Path:
    """Write the page of some runs, and again whenever they go on if it is to `watch` them.

    out: folder for report.html and report/, its pictures; None is the run's own, or for several
        `report`. Returns the path of the page. Raises UserError for what is no run.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(
            f"RUN: got {len(folders)} runs, and a picture can tell {MOST_RUNS} apart; give fewer"
        )
    if out is None:
        out = folders[0] if len(folders) == 1 else Path("report")
    page = write(load(folders), out, refresh=watch)
    display.note(f"report: {page}")
    if watch:
        try:
            _follow(folders, out)
        except KeyboardInterrupt:
            display.note("stopped watching")
        write(load(folders), out)
    return page


def write(runs: Sequence[Run], out: Path, refresh: bool = False) -> Path:
    """`out/report.html`, and `out/report/` with a PNG and an SVG of each picture."""
    pictures = out / "report"
    pictures.mkdir(parents=True, exist_ok=True)
    shown, left_out = [], []
    for picture in PICTURES:
        with style.settings(picture.name):
            drawn = picture.draw(runs)
            if drawn is None:
                left_out.append(picture)
                continue
            svg = style.write(drawn.figure, pictures / picture.name)
        shown.append(Shown(picture, drawn.reading, svg))
    page = out / "report.html"
    with atomic_files.replacing(page) as temporary:
        temporary.write_text(html(runs, shown, left_out, refresh), encoding="utf-8")
    return page


def html(
    runs: Sequence[Run], shown: Sequence[Shown], left_out: Sequence[Picture], refresh: bool
) -> str:
    """The page. All text is escaped but the pictures, in which matplotlib has escaped it."""
    environment = Environment(
        loader=PackageLoader("fastpref.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values: dict[str, Any] = {
        "runs": runs,
        "colours": [style.colour(k) for k in range(len(runs))],
        "shown": shown,
        "left_out": left_out,
        "metrics": tables.final_metrics(runs),
        "differences": tables.differences(runs),
        "refresh": REFRESH if refresh else None,
    }
    return environment.get_template("report.html").render(values)


def _follow(folders: Sequence[Path], out: Path) -> None:
    """Write the page anew whenever a file of metrics has changed; ends with Ctrl-C."""
    seen = _stamps(folders)
    while True:
        time.sleep(REFRESH)
        now = _stamps(folders)
        if now != seen:
            write(load(folders), out, refresh=True)
            seen = now


def _stamps(folders: Sequence[Path]) -> list[tuple[int, int]]:
    found = [(folder / "metrics.jsonl").stat() for folder in folders]
    return [(each.st_mtime_ns, each.st_size) for each in found]
