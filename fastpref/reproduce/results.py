"""What a reproduction leaves: a JSON file with every number, and from it a page and a picture."""

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
from fastpref.utils import environment


def write(
    study: Study, size: Size, outcomes: Sequence[Outcome], out: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write `out / NAME.json`, `.md` and `.png`, and return what the JSON file holds."""
    found = {
        "benchmark": f"reproduce {study.name}",
        **environment.describe(),
        "size": size.name,
        **about,
        "claims": claims(study, outcomes),
        "table": table(study, outcomes),
        "runs": [vars(outcome) for outcome in outcomes],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{study.name}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    (out / f"{study.name}.md").write_text(page(study, found))
    draw(study, found, out / f"{study.name}.png")
    return found


def draw(study: Study, found: dict[str, Any], path: Path) -> None:
    """The picture of a result file."""
    outcomes = [Outcome(**run) for run in found["runs"]]
    charts.save(lambda: study.draw(by_seed(outcomes)), path)


def by_seed(outcomes: Iterable[Outcome]) -> list[Runs]:
    """The runs of each seed, by label."""
    seeds: dict[int, Runs] = {}
    for outcome in outcomes:
        seeds.setdefault(outcome.seed, {})[outcome.label] = outcome
    return [seeds[seed] for seed in sorted(seeds)]


def claims(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each claim with its number in every seed and the verdict."""
    seeds = by_seed(outcomes)
    judged = []
    for claim in study.claims:
        try:
            values = [float(claim.value(runs)) for runs in seeds]
        except Missing:
            values = []
        judged.append(
            {
                "statement": claim.statement,
                "source": claim.source,
                "number": claim.number,
                "bound": claim.bound,
                "values": [float(f"{value:.5g}") for value in values],
                "verdict": verdict(claim, values),
            }
        )
    return judged


def table(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each label: the values of its seeds, by column."""
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


def page(study: Study, found: dict[str, Any]) -> str:
    """The verdicts and the table in Markdown."""
    parts = (f"## {study.title}", study.setting, verdicts(found), numbers(study, found))
    return "\n\n".join(parts) + "\n"


def verdicts(found: dict[str, Any]) -> str:
    """In Markdown: what the paper says, the number that decides, and whether it holds here."""
    rows = [
        [
            f"{claim['statement']} ({claim['source']})",
            claim["number"],
            claim["bound"].replace("-", "−"),
            spread(claim["values"], _form(claim["values"])) if claim["values"] else "–",
            f"**{claim['verdict']}**",
        ]
        for claim in found["claims"]
    ]
    return markdown.table(("the paper says", "number", "holds if", "found", "verdict"), rows)


def numbers(study: Study, found: dict[str, Any]) -> str:
    """In Markdown: mean (least to most) over the seeds of each number of each run."""
    rows = [
        [row["label"], *(_cell(column, row.get(column.title)) for column in study.columns)]
        for row in found["table"]
    ]
    return markdown.table(("run", *(column.title for column in study.columns)), rows)


def _cell(column: Column, values: Sequence[float] | None) -> str:
    return "" if values is None else spread(values, f".{column.digits}f")


def _form(values: Sequence[float]) -> str:
    """About three digits."""
    size = max(map(abs, [statistics.fmean(values), max(values) - min(values)]))
    return ".1f" if size >= 10 else ".2f" if size >= 1 else ".3f" if size >= 0.01 else ".1e"
