"""Tables of a report: final metrics with the best run marked, and config differences."""

from __future__ import annotations

import math
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


# Loss and rewards have the units of their objective, so runs with other objectives do not compare;
# `_direction` knows when losses do. Neither a low rejected log-prob nor a long response is better
# in general.
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
    Measure("reward", "reward of the samples", "higher"),
    Measure("kl", "KL to the reference (nats per response)"),
    Measure("clip_share", "tokens beyond the clipping (fraction)"),
    Measure("value_loss", "loss of the values"),
    Measure("length", "length of the samples (tokens)"),
    Measure("entropy", "entropy (nats per token)"),
    Measure("band/inside", "batches inside the band", "higher"),
    Measure("pair_band/inside", "pairs inside their bands", "higher"),
    Measure("band/cosine", "cosine of the batch's scores"),
    Measure("lengths/chosen", "length, chosen (tokens)"),
    Measure("lengths/rejected", "length, rejected (tokens)"),
    Measure("grad_norm", "gradient norm"),
    Measure("tokens_per_second", "tokens per second, median", "higher"),
    Measure("peak_memory_gib", "peak memory (GiB)", "lower"),
)
# Fields without an effect on the result.
_PATH_FIELDS = ("training.output_dir", "resume", "data.cache")
# Prefixes of the fields that a held-out loss depends on, besides the policy.
_LOSS_FIELDS = (
    "loss",
    "reference",
    "model.path",
    "adapter.path",
    "data.eval",
    "data.max_length",
    "data.truncation",
    "data.add_eos",
    "data.soft_labels",
    "data.token_weights",
)


class Cell(NamedTuple):
    """Text of a table cell, and whether it is marked as the best."""

    text: str
    best: bool = False


class TableRow(NamedTuple):
    """Row of a table with one cell for each run."""

    label: str
    better: str
    cells: list[Cell]


class Comparison(NamedTuple):
    """Last value of a measure in each run, None where a run has none.

    held_out: whether the values are of evaluations.
    """

    measure: Measure
    values: list[float | None]
    held_out: bool


def comparisons(runs: Sequence[Run], measures: Sequence[Measure] = MEASURES) -> list[Comparison]:
    """Values of the measures that a run has, from evaluations if any run has one."""
    rows = []
    for measure in measures:
        values = [_last(run, f"eval_{measure.metric}") for run in runs]
        held_out = values != [None] * len(runs)
        if not held_out:
            values = [_last(run, measure.metric) for run in runs]
        if values != [None] * len(runs):
            better = _direction(measure, held_out, runs)
            rows.append(Comparison(measure._replace(better=better), values, held_out))
    return rows


def final_metrics(runs: Sequence[Run]) -> list[TableRow]:
    """Last value of each metric that a run has; the best are marked unless all are equal."""
    steps = TableRow("optimizer steps", "", [Cell(f"{run.step:,}") for run in runs])
    return [steps, *map(metric_row, comparisons(runs))]


def metric_row(comparison: Comparison) -> TableRow:
    """Row of a comparison; the best values are marked unless all are equal."""
    measure, values, held_out = comparison
    texts = ["–" if value is None else number(value) for value in values]
    best = _best([value for value in values if value is not None], measure.better)
    label = measure.label + (", held-out" if held_out else "")
    return TableRow(label, measure.better, [Cell(text, text == best) for text in texts])


def foremost(runs: Sequence[Run], count: int) -> tuple[list[Run], str]:
    """Return the `count` best runs in their order, and by which measure they are the best.

    It is the first measure with a direction; without one these are the first runs, and "".
    """
    directed = [row for row in comparisons(runs) if row.measure.better]
    if not directed:
        return list(runs[:count]), ""
    row = directed[0]
    sign = -1 if row.measure.better == "higher" else 1
    keys = [math.inf if value is None else sign * value for value in row.values]
    chosen = sorted(range(len(runs)), key=keys.__getitem__)[:count]
    return [runs[k] for k in sorted(chosen)], metric_row(row).label


def differences(runs: Sequence[Run]) -> list[TableRow]:
    """Config fields whose values differ between runs."""
    fields = {field: None for run in runs for field in run.settings if field not in _PATH_FIELDS}
    rows = (TableRow(f, "", [Cell(run.settings.get(f, "–")) for run in runs]) for f in fields)
    return [row for row in rows if len({*row.cells}) > 1]


def _direction(measure: Measure, held_out: bool, runs: Sequence[Run]) -> str:
    """`better` of a measure; a held-out loss of one objective, data set and reference has one."""
    if measure.metric != "loss" or not held_out or len(runs) < 2:
        return measure.better
    first, *others = (
        {name: value for name, value in run.settings.items() if name.startswith(_LOSS_FIELDS)}
        for run in runs
    )
    return "lower" if all(other == first for other in others) else ""


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
