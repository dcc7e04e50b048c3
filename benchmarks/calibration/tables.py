"""Markdown tables of the results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastpref.docgen import markdown

BAND_COLUMNS = {  # title: name in the summary, digits
    "log r": ("in_training/band/log_r", 2),
    "log r*": ("in_training/band/log_r_star", 2),
    "cosine": ("in_training/band/cosine", 2),
    "steps both up": ("in_training/pathway_i", 2),
    "both down": ("in_training/pathway_ii", 2),
    "apart": ("in_training/pathway_iii", 2),
    "pairs inside theirs": ("in_training/pair_band/inside", 2),
    "cosine of pairs": ("in_training/pair_band/cosine", 2),
}
ONE_STEP_COLUMNS = {  # title: name in `one_step`
    "inside the band": "inside",
    "went as predicted": "agree",
    "inside by the head's scores": "head_inside",
    "went as these predict": "head_agree",
}
OUTCOME_COLUMNS = {
    "train: chosen": ("train/chosen_change", 1),
    "rejected": ("train/rejected_change", 1),
    "displaced": ("train/displaced", 2),
    "disentangled": ("train/disentangled", 2),
    "held out: chosen": ("held_out/chosen_change", 1),
    "rejected ": ("held_out/rejected_change", 1),
    "disentangled ": ("held_out/disentangled", 2),
    "accuracy": ("held_out/accuracy", 2),
}


def tables(training: dict[str, Any]) -> tuple[str, str, str]:
    """Markdown tables: the band in training, the outcome, and the steps of gradient descent."""
    rows = training["summary"]
    band_in_training, outcomes = (
        _table(columns, {_title(row): _cells(row, columns) for row in rows})
        for columns in (BAND_COLUMNS, OUTCOME_COLUMNS)
    )
    one_steps = {
        _title(run): [f"{run['one_step'].get(name, 0):.0%}" for name in ONE_STEP_COLUMNS.values()]
        for run in training["runs"]
        if "one_step" in run
    }
    return band_in_training, outcomes, _table(ONE_STEP_COLUMNS, one_steps)


def overhead_table(overhead: dict[str, Any]) -> str:
    """Markdown table: a step by scope, and score geometry relative to the log-probs of a head."""
    rows = {}
    for part, base in (("seconds_per_step", "none"), ("seconds_of_head", "linear_logps")):
        first = overhead[part][base]["median"]
        for name, times in overhead[part].items():
            rows[name] = [f"{times['median'] * 1e3:.0f} ms", f"{times['median'] / first:.2f}"]
    return _table(("time", "beside the first"), rows)


def sketch_table(sketch: dict[str, Any]) -> str:
    """Markdown table: root mean square deviations by the rows of the sketch."""
    rows = {
        f"{int(rows):,}": [f"{value['log_r_star']:.4f}", f"{value['cosine']:.4f}"]
        for rows, value in sketch["rms_deviation"].items()
    }
    return markdown.table(["rows", "log r*", "cosine"], ([k, *v] for k, v in rows.items()))


def _title(row: dict[str, Any]) -> str:
    title = f"{row['objective']}, {row['optimizer']}"
    title += "" if row["statistics"] is None else f", RC of {row['statistics']}"
    return title + (", all scores" if row["scope"] == "full" else "")


def _cells(row: dict[str, Any], columns: dict[str, tuple[str, int]]) -> list[str]:
    cells = []
    for name, digits in columns.values():
        mean, least, most = (f"{value:.{digits}f}" for value in row[name])
        cells.append(f"{mean} ({least} to {most})")
    return cells


def _table(columns: Iterable[str], rows: dict[str, list[str]]) -> str:
    return markdown.table(["", *columns], ([title, *cells] for title, cells in rows.items()))
