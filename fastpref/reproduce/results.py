"""Output of a reproduction: a JSON file with every number; from it, a page and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpref.docgen import markdown
from fastpref.reproduce import charts
from fastpref.reproduce.claims import Claim, Missing, judge, pooled
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import Column, Outcome, Runs, Study, spread
from fastpref.utils import environment, result_json

VERDICT_COLUMNS = (
    "the paper says", "protocol", "number", "n per seed", "value ± standard error", "holds if",
    "verdict",
)  # fmt: skip


def write(
    study: Study, size: Size, outcomes: Sequence[Outcome], out: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Write `out / NAME.json`, `.md` and `.png`, and return the contents of the JSON file.

    Metrics of every step, much larger, go to `NAME-runs.json`.
    """
    result = {
        "benchmark": f"reproduce {study.name}",
        **environment.describe(),
        "size": size.name,
        "model": None if size.model is None else size.model.name,
        **provenance,
        "claims": claims(study, outcomes, size.quick),
        "table": table(study, outcomes),
    }
    out.mkdir(parents=True, exist_ok=True)
    text = result_json.dumps(result)
    result = json.loads(text)
    (out / f"{study.name}.json").write_text(text)
    (out / f"{study.name}-runs.json").write_text(json.dumps([vars(o) for o in outcomes]) + "\n")
    (out / f"{study.name}.md").write_text(page(study, result))
    charts.save(lambda: study.draw(by_seed(outcomes)), out / f"{study.name}.png")
    return result


def by_seed(outcomes: Iterable[Outcome]) -> list[Runs]:
    """The runs of each seed, by label."""
    seeds: dict[int, Runs] = {}
    for outcome in outcomes:
        seeds.setdefault(outcome.seed, Runs())[outcome.label] = outcome
    return [seeds[seed] for seed in sorted(seeds)]


def claims(study: Study, outcomes: Sequence[Outcome], quick: bool = False) -> list[dict[str, Any]]:
    """Each claim with its number in every seed, their mean and its error, and the verdict."""
    return [_record(claim, by_seed(outcomes), quick) for claim in study.claims]


def _record(claim: Claim, seeds: Sequence[Runs], quick: bool) -> dict[str, Any]:
    missing = ""
    try:
        measured = [claim.measure(runs) for runs in seeds]
    except Missing as error:
        measured, missing = [], str(error)
    record: dict[str, Any] = {
        "statement": claim.statement,
        "source": claim.source,
        "kind": claim.kind,
        "protocol": claim.protocol,
        "number": claim.number,
        "bound": claim.bound,
        "verdict": str(judge(claim, measured, quick, missing)),
    }
    if measured:
        number = pooled(measured)
        record |= {
            "values": [_finite(seed.value) for seed in measured],
            "value": _finite(number.value),
            "standard_error": _finite(number.standard_error) if number.n or seeds[1:] else None,
            "n": number.n,
        }
    return record


def _finite(value: float) -> float | None:
    """Five digits; None for a number that JSON cannot hold."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def table(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each label that has a value, with those of its seeds by column."""
    seeds = by_seed(outcomes)
    rows = []
    for label in seeds[0]:
        cells = {}
        for column in study.columns:
            try:
                cells[column.title] = [column.value(runs, label) for runs in seeds]
            except Missing:
                continue
        if cells:
            rows.append({"label": label} | cells)
    return rows


def page(study: Study, result: dict[str, Any]) -> str:
    """The verdicts and the table as Markdown."""
    parts = (f"## {study.title}", study.setting, verdicts(result), numbers(study, result))
    return "\n\n".join(parts) + "\n"


def verdicts(result: dict[str, Any]) -> str:
    """Markdown table of the paper's claims, the numbers that decide them, and the verdicts."""
    rows = [
        [
            f"{claim['statement']} ({claim['source']})",
            claim["protocol"],
            claim["number"] or "–",
            f"{claim['n']:,}" if claim.get("n") else "–",
            _measured(claim),
            claim["bound"].replace("-", "−") or "–",
            f"**{claim['verdict']}**",
        ]
        for claim in result["claims"]
    ]
    return markdown.table(VERDICT_COLUMNS, rows)


def _measured(claim: dict[str, Any]) -> str:
    """The value and its standard error; theorems have none."""
    value, error = claim.get("value"), claim.get("standard_error")
    if value is None:
        return "–"
    has_error = claim["kind"] == "finding" and error is not None
    form = _form(error if has_error and error else value / 10)
    text = f"{value:{form}}" + (f" ± {error:{form}}" if has_error else "")
    return text.replace("-", "−")


def numbers(study: Study, result: dict[str, Any]) -> str:
    """Markdown table of each run's numbers: mean (minimum to maximum) over the seeds."""
    rows = [
        [row["label"], *(_cell(column, row.get(column.title)) for column in study.columns)]
        for row in result["table"]
    ]
    return markdown.table(("run", *(column.title for column in study.columns)), rows)


def _cell(column: Column, values: Sequence[float] | None) -> str:
    return "" if values is None else spread(values, f".{column.digits}f")


def _form(size: float) -> str:
    """Format that shows two digits of a number of this size."""
    digits = 1 - math.floor(math.log10(abs(size))) if size else 2
    return f".{max(0, digits)}f" if digits <= 5 else ".1e"
