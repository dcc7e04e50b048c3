"""Tables of a report: final metrics with the best run marked, and config differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastpref.report.chart import number
from fastpref.report.runs import Run


class Measure(NamedTuple):
    """Metric of the table; better is "higher", "lower", or "" for neither."""

    metric: str
    label: str
    better: str = ""


# Loss and rewards have the units of their objective, so runs with other objectives do not compare.
# Neither a low rejected log-prob nor a long response is better in general.
MEASURES = (
    Measure("loss", "loss"),
    Measure("rewards/accuracies", "accuracy of rewards", "higher"),
    Measure("rewards/margins", "margin of rewards (β · nats)"),
    Measure("preference/accuracy", "accuracy on p", "higher"),
    Measure("preference/mean_kl", "mean KL to p (nats)", "lower"),
    Measure("preference/pci", "PCI", "higher"),
    Measure("logps/chosen", "log-prob, chosen (nats)", "higher"),
    Measure("logps/rejected", "log-prob, rejected (nats)"),
    Measure("logps/chosen_change", "change, chosen (nats)", "higher"),
    Measure("logps/rejected_change", "change, rejected (nats)"),
    Measure("contrast/mean", "contrastive logit (nats)"),
    Measure("entropy", "entropy (nats per token)"),
    Measure("band/inside", "pairs inside the band", "higher"),
    Measure("band/cosine", "cosine of the scores"),
    Measure("lengths/chosen", "length, chosen (tokens)"),
    Measure("lengths/rejected", "length, rejected (tokens)"),
    Measure("grad_norm", "gradient norm"),
    Measure("tokens_per_second", "tokens per second, median", "higher"),
    Measure("peak_memory_gib", "peak memory (GiB)", "lower"),
)
# Fields without an effect on the result.
_PATH_FIELDS = ("training.output_dir", "resume", "data.cache")


class Cell(NamedTuple):
    """Text of a table cell, and whether it is marked as the best."""

    text: str
    best: bool = False


class TableRow(NamedTuple):
    """Row of a table with one cell for each run."""

    label: str
    better: str
    cells: list[Cell]


def final_metrics(runs: Sequence[Run]) -> list[TableRow]:
    """Last value of each metric that a run has, from evaluations if any run has one.

    The best values are marked unless all are equal.
    """
    rows = [TableRow("optimizer steps", "", [Cell(f"{run.step:,}") for run in runs])]
    for measure in MEASURES:
        held_out = [_last(run, f"eval_{measure.metric}") for run in runs]
        values = held_out
        if all(value is None for value in held_out):
            values = [_last(run, measure.metric) for run in runs]
        numbers = [value for value in values if value is not None]
        if numbers:
            texts = ["–" if value is None else number(value) for value in values]
            best = _best(numbers, measure.better)
            suffix = ", held-out" if values is held_out else ""
            cells = [Cell(text, text == best) for text in texts]
            rows.append(TableRow(measure.label + suffix, measure.better, cells))
    return rows


def differences(runs: Sequence[Run]) -> list[TableRow]:
    """Config fields whose values differ between runs."""
    fields = {field: None for run in runs for field in run.settings if field not in _PATH_FIELDS}
    rows = (TableRow(f, "", [Cell(run.settings.get(f, "–")) for run in runs]) for f in fields)
    return [row for row in rows if len({*row.cells}) > 1]


def _best(values: list[float], better: str) -> str | None:
    """Text of the best value; values that round to the same text are equal."""
    low, high = number(min(values)), number(max(values))
    return {"higher": high, "lower": low}.get(better) if low != high else None


def _last(run: Run, metric: str) -> float | None:
    """Last value of a metric, the median for the speed, or None."""
    values = run.series(metric).values
    if not len(values):
        return None
    return float(np.median(values) if metric == "tokens_per_second" else values[-1])
