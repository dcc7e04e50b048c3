"""Completions of held-out prompts in a report: at the first and at the last evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpref.report.runs import Run

MOST = 10  # prompts of a run; `samples.jsonl` has all


class Sample(NamedTuple):
    """Prompt with a completion for each column of its table."""

    prompt: str
    completions: list[str]


class SampleTable(NamedTuple):
    """Samples of a run, whose columns are evaluations."""

    run: str
    steps: list[int]
    samples: list[Sample]
    left_out: int  # prompts that are only in the file


def sample_tables(runs: Sequence[Run]) -> list[SampleTable]:
    """Tables of the runs that have samples."""
    return [_table(run) for run in runs if run.samples]


def _table(run: Run) -> SampleTable:
    by_prompt: dict[str, dict[int, str]] = {}
    for line in run.samples:
        by_prompt.setdefault(line["prompt"], {})[line["step"]] = _text(line)
    steps = sorted({line["step"] for line in run.samples})
    shown = steps[:1] + steps[1:][-1:]
    samples = [
        Sample(prompt, [completions.get(step, "–") for step in shown])
        for prompt, completions in by_prompt.items()
    ]
    return SampleTable(run.name, shown, samples[:MOST], max(0, len(samples) - MOST))


def _text(line: dict[str, Any]) -> str:
    """Text of a completion, with a sign where it was cut."""
    text = str(line["completion"]).strip()
    return text if line["finished"] else f"{text} …"
