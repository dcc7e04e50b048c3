"""Tables of the result file, as Markdown."""

from __future__ import annotations

from benchmarks.real_model.bench import Values
from fastpref.docgen import markdown

_HELD_OUT = {  # title: metric, digits
    "accuracy before": ("accuracy_before", 3),
    "after": ("accuracy", 3),
    "gain": ("accuracy_gain", 3),
    "gain per token": ("accuracy_per_token_gain", 3),
    "reward accuracy": ("reward_accuracy", 3),
    "margin of log-ratios, nats": ("log_ratio_margin", 2),
    "chosen, nats": ("chosen_change", 2),
    "rejected, nats": ("rejected_change", 2),
}


def objectives_table(report: Values) -> str:
    """Held-out metrics of the runs of fastpref, each ± its standard error."""
    rows = {
        f"{title}: {name}": run
        for part, title in (("objectives", "HH harmless"), ("alpacaeval", "AlpacaEval"))
        for name, run in report.get(part, {}).get("runs", {}).items()
    }
    return _held_out_table(rows)


def trl_table(report: Values) -> str:
    """Held-out metrics of fastpref's DPO and TRL's."""
    return _held_out_table(
        {name: report["trl"][name] for name in ("fastpref", "TRL") if "trl" in report}
    )


def _held_out_table(runs: dict[str, Values]) -> str:
    cells = (
        [name, *(_cell(run["held_out"][key], digits) for key, digits in _HELD_OUT.values())]
        for name, run in runs.items()
    )
    return markdown.table(("", *_HELD_OUT), cells)


def _cell(metric: dict[str, float], digits: int) -> str:
    return f"{metric['value']:.{digits}f} ± {metric['standard_error']:.{digits}f}".replace("-", "−")
