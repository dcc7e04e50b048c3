"""Rounds of a run side by side: a table with a column for each round, and charts over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastpref.report.chart import Chart, ChartSpec, moved, number, sentence
from fastpref.report.runs import Run
from fastpref.report.style import LINE, color, legend, panels, run_entries
from fastpref.report.tables import Cell, Measure, TableRow

_MEASURES = (
    Measure("eval_reward", "score on held-out prompts", "higher"),
    Measure("eval_win_rate", "win rate against the start", "higher"),
    Measure("eval_length", "length on held-out prompts (tokens)"),
    Measure("eval_finished", "ended by themselves, held-out", "higher"),
    Measure("entropy", "entropy (nats per token)"),
    Measure("kl_to_start", "KL to the start (nats per completion)"),
    Measure("reward", "score of the samples", "higher"),
    Measure("reward_best", "best score of a prompt, mean", "higher"),
    Measure("reward_std", "spread of the scores of a prompt"),
    Measure("length", "length of the samples (tokens)"),
    Measure("finished", "samples that ended by themselves"),
    Measure("kl", "KL of the samples to the reference (nats per completion)"),
    Measure("clip_share", "tokens beyond the clipping (fraction)"),
    Measure("value_explained", "variance of the returns that the values explain", "higher"),
    Measure("loss", "loss"),
    Measure("value_loss", "loss of the values"),
    Measure("pairs", "pairs"),
    Measure("without_pair", "prompts without a pair"),
    Measure("score_gap", "score gap of the pairs"),
)
_CHARTED = {
    "eval_reward": "score, held-out",
    "eval_win_rate": "win rate",
    "reward": "score, samples",
    "eval_length": "length (tokens)",
    "entropy": "entropy (nats/token)",
    "kl_to_start": "KL to start (nats)",
}


class RoundTable(NamedTuple):
    """Rounds of one run; round 0 is the start."""

    run: str
    rounds: list[int]
    rows: list[TableRow]


def round_tables(runs: Sequence[Run]) -> list[RoundTable]:
    """Tables of the runs that have rounds."""
    return [_table(run) for run in runs if run.rounds]


def _table(run: Run) -> RoundTable:
    rows = []
    for measure in _MEASURES:
        values = [record.get(measure.metric) for record in run.rounds]
        if any(value is not None for value in values):
            texts = ["–" if value is None else number(value) for value in values]
            rows.append(TableRow(measure.label, measure.better, [Cell(text) for text in texts]))
    return RoundTable(run.name, [record["round"] for record in run.rounds], rows)


def _draw(runs: Sequence[Run]) -> Chart | None:
    """Draw a panel for each metric that a run has, with the rounds from left to right."""
    charted = [name for name in _CHARTED if any(len(_points(run, name)[0]) > 1 for run in runs)]
    if not charted:
        return None
    figure, axes = panels(len(charted), height=1.5, sharex=True)
    parts: dict[str, list[str]] = {}
    for axis, name in zip(axes, charted, strict=True):
        for position, run in enumerate(runs):
            rounds, values = _points(run, name)
            axis.plot(rounds, values, color=color(position), marker="o", markersize=4, **LINE)
            if len(values):
                reading = f"{_CHARTED[name]} {moved(values[0], values[-1])}"
                parts.setdefault(run.name, []).append(reading)
        axis.set_ylabel(_CHARTED[name])
    axes[-1].set_xlabel("round (0: the start)")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    legend(figure, run_entries([run.name for run in runs]))
    return Chart(figure, sentence(runs, {name: ", ".join(part) for name, part in parts.items()}))


def _points(run: Run, name: str) -> tuple[Any, Any]:
    """Rounds and values of a metric."""
    points = [(record["round"], record[name]) for record in run.rounds if name in record]
    rounds, values = zip(*points, strict=True) if points else ((), ())
    return np.array(rounds, dtype=np.float64), np.array(values, dtype=np.float64)


CHART = ChartSpec("rounds", "Rounds", _draw, "two rounds of fastpref rounds")
