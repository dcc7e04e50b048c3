"""Rounds on a real model.

The score of an answer is the rule of `helpful_form`. It rises where an answer to each held-out
prompt has a higher mean score after three rounds than before, by more than two standard errors,
over prompts, of the difference.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref import config as configs
from fastpref import metrics
from fastpref.data.messages import text_of
from fastpref.docgen import markdown
from fastpref.rounds import loop, sequence
from fastpref.utils.progress import Display

ROUNDS = 3


class HelpfulForm:
    """Scorer: a point each for an end, 20 to 60 words, three listed items, and no apology."""

    fingerprint = "helpful form 2"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [helpful_form(text) for text in completions]


def helpful_form(text: str) -> float:
    """Points for the form of an answer: its end, its length, a list, and no apology."""
    words = len(text.split())
    items = len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE))
    ends = text.rstrip().endswith((".", "!", "?", ")"))
    apologizes = re.search(r"\b(sorry|as an ai|i cannot|i can't)\b", text, re.IGNORECASE)
    length = 1 - min(1.0, max(0, 20 - words) / 20 + max(0, words - 60) / 60)
    return ends + length + min(items, 3) / 3 + (apologizes is None)


def on_a_model(out: Path, model: Path, data: Path, display: Display) -> dict[str, Any]:
    """Three rounds of LoRA on a real model, whose answers are scored by their form."""
    lines = data.read_text(encoding="utf-8").splitlines()
    short = [row for row in map(json.loads, lines) if len(_question(row)) < 200][:80]
    paths = {"train": out / "prompts.jsonl", "eval": out / "held-out.jsonl"}
    for path, rows in zip(paths.values(), (short[:32], short[32:]), strict=True):
        messages = [[{"role": "user", "content": _question(row)}] for row in rows]
        text = "".join(json.dumps({"prompt": each}) + "\n" for each in messages)
        path.write_text(text, encoding="utf-8")
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"r": 16, "alpha": 32},
        "data": {
            **{name: str(path) for name, path in paths.items()},
            "max_length": 256,
            "cache": str(out / "cache"),
        },
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": {"lr": 5e-4},
        "training": {"batch_size": 8, "log_every": 2, "output_dir": str(out / "run")},
        "rounds": {
            "count": ROUNDS,
            "prompts": 16,
            "steps": 8,
            "sampling": {"samples": 4, "max_new_tokens": 64, "batch_size": 48},
            "scorer": {"function": "helpful:form"},
            "pairs": "all",
            "min_gap": 0.2,
            "eval_prompts": 48,
        },
    }
    loop.run(configs.parse(values), display, scorer=HelpfulForm)
    before, after = (_held_out_scores(out / "run", number) for number in (0, ROUNDS))
    gains = [new - old for new, old in zip(after, before, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return {
        "rounds": metrics.read_records(out / "run" / sequence.FILE),
        "gain": {"value": statistics.fmean(gains), "standard_error": error, "prompts": len(gains)},
    }


def _held_out_scores(run: Path, number: int) -> list[float]:
    """Score of the completion of each held-out prompt after a round."""
    (path,) = (run / "rounds" / f"{number:04}").glob("eval-scores-*.jsonl")
    return [json.loads(line)["scores"][0] for line in path.read_text().splitlines()]


def model_table(result: Any) -> str:
    """Measures of the held-out answers of the real model, by round."""
    rows = [
        [
            "start" if row["round"] == 0 else str(row["round"]),
            f"{row['eval_reward']:.2f}",
            f"{row['eval_length']:.0f}",
            f"{row['eval_finished']:.2f}",
            f"{row['kl_to_start']:.1f}",
        ]
        for row in result["real_model"]["rounds"]
    ]
    return markdown.table(("round", "score", "tokens", "ended by itself", "KL to the start"), rows)


def _question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else text_of(prompt[-1]["content"])
