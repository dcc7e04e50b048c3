"""Output of a reproduction: a JSON file with every number; from it, a page and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpref.docgen import markdown
from fastpref.reproduce import charts
from fastpref.reproduce.runner import Size
from fastpref.reproduce.study import Column, Missing, Outcome, Runs, Study, spread, verdict
from fastpref.utils import environment, result_json


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
        **provenance,
        "claims": claims(study, outcomes),
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
        seeds.setdefault(outcome.seed, {})[outcome.label] = outcome
    return [seeds[seed] for seed in sorted(seeds)]


def claims(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each claim, with its number in every seed and the verdict."""
    seeds = by_seed(outcomes)
    records = []
    for claim in study.claims:
        try:
            values = [float(claim.value(runs)) for runs in seeds]
        except Missing:
            values = []
        records.append(
            {
                "statement": claim.statement,
                "source": claim.source,
                "number": claim.number,
                "bound": claim.bound,
                "values": [float(f"{value:.5g}") for value in values],
                "verdict": verdict(claim, values),
            }
        )
    return records


def table(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each label, with the values of its seeds by column."""
    seeds = by_seed(outcomes)
    return [
        {"label": label}
        | {
            column.title: [column.value(runs[label]) for runs in seeds]
            for column in study.columns
            if seeds[0][label].has(column.metric)
        }
        for label in seeds[0]
    ]


def page(study: Study, result: dict[str, Any]) -> str:
    """The verdicts and the table as Markdown."""
    parts = (f"## {study.title}", study.setting, verdicts(result), numbers(study, result))
    return "\n\n".join(parts) + "\n"


def verdicts(result: dict[str, Any]) -> str:
    """Markdown table of the paper's claims, the numbers that decide them, and the verdicts."""
    rows = [
        [
            f"{claim['statement']} ({claim['source']})",
            claim["number"],
            claim["bound"].replace("-", "−"),
            spread(claim["values"], _form(claim["values"])) if claim["values"] else "–",
            f"**{claim['verdict']}**",
        ]
        for claim in result["claims"]
    ]
    return markdown.table(("the paper says", "number", "holds if", "measured", "verdict"), rows)


def numbers(study: Study, result: dict[str, Any]) -> str:
    """Markdown table of each run's numbers: mean (minimum to maximum) over the seeds."""
    rows = [
        [row["label"], *(_cell(column, row.get(column.title)) for column in study.columns)]
        for row in result["table"]
    ]
    return markdown.table(("run", *(column.title for column in study.columns)), rows)


def _cell(column: Column, values: Sequence[float] | None) -> str:
    return "" if values is None else spread(values, f".{column.digits}f")


def _form(values: Sequence[float]) -> str:
    """Format with about three digits."""
    size = max(map(abs, [statistics.fmean(values), max(values) - min(values)]))
    return ".1f" if size >= 10 else ".2f" if size >= 1 else ".3f" if size >= 0.01 else ".1e"
