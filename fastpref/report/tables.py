"""Tables of a report: final metrics with the best marked, and in what the configs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastpref.report.chart import number
from fastpref.report.runs import Run


class Measure(NamedTuple):
    """A metric of the table. better: "higher" or "lower", or "" where neither is."""

    metric: str
    label: str
    better: str = ""


# Loss and rewards have the units of their objective, so only runs of the same one could be ranked.
# Whether it is good that a rejected log-prob falls far, or a response is long, nobody can say.
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
_OWN_FIELDS = ("training.output_dir", "resume", "data.cache")  # differ without making a difference


class Cell(NamedTuple):
    text: str
    best: bool = False


class Row(NamedTuple):
    label: str
    better: str
    cells: list[Cell]


def final_metrics(runs: Sequence[Run]) -> list[Row]:
    """The last value of each metric that some run has, held out where any run has that.

    The best is marked among two or more runs, and no run where all are equal.
    """
    rows = [Row("optimizer steps", "", [Cell(f"{run.step:,}") for run in runs])]
    for measure in MEASURES:
        held_out = [_last(run, f"eval_{measure.metric}") for run in runs]
        values = held_out
        if all(value is None for value in held_out):
            values = [_last(run, measure.metric) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            texts = ["–" if value is None else number(value) for value in values]
            best = _best(known, measure.better)
            where = ", held-out" if values is held_out else ""
            cells = [Cell(text, text == best) for text in texts]
            rows.append(Row(measure.label + where, measure.better, cells))
    return rows


def differences(runs: Sequence[Run]) -> list[Row]:
    """Fields of the configs that are not the same in all runs."""
    fields = {field: None for run in runs for field in run.settings if field not in _OWN_FIELDS}
    rows = (Row(f, "", [Cell(run.settings.get(f, "–")) for run in runs]) for f in fields)
    return [row for row in rows if len({*row.cells}) > 1]


def _best(values: list[float], better: str) -> str | None:
    """The best as it is shown: what rounding makes equal is equal."""
    low, high = number(min(values)), number(max(values))
    return {"higher": high, "lower": low}.get(better) if low != high else None


def _last(run: Run, metric: str) -> float | None:
    values = run.series(metric).values
    if not len(values):
        return None
    return float(np.median(values) if metric == "tokens_per_second" else values[-1])
