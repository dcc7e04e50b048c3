"""Result files of a comparison, in the forms of AlpacaEval and Arena-Hard, and all numbers.

- `annotations.json`, AlpacaEval 2: `preference` is 1 for the baseline, 2 for the model, 1.5 a tie
- `leaderboard.csv`, AlpacaEval 2: a row of its leaderboards, rates in percent
- `arena-hard.jsonl`, Arena-Hard: the fields of v0.1 (`question_id`) and of v2.0 (`uid`)
- `judge.json`: all numbers and settings
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fastpref.evaluation.judge.summary import Summary
from fastpref.evaluation.judge.verdicts import Judged
from fastpref.utils import atomic_files

ANNOTATIONS, LEADERBOARD, ARENA = "annotations.json", "leaderboard.csv", "arena-hard.jsonl"
RESULT, ANSWERS = "judge.json", "answers.jsonl"
# show_result.py of Arena-Hard v2.0 reads this category unless told otherwise.
_CATEGORY = "hard_prompt"


def write(
    folder: Path,
    judged: list[Judged],
    summary: Summary,
    names: tuple[str, str],
    judge: str,
    settings: dict[str, Any],
) -> None:
    """Write all files, `judge.json` last.

    names: of the model and the baseline. judge: name of the judge.
    """
    annotations = [annotation(each, names, judge) for each in judged]
    _write(folder / ANNOTATIONS, json.dumps(annotations, indent=2, ensure_ascii=False) + "\n")
    _write(folder / LEADERBOARD, leaderboard(summary, names[0]))
    lines = [json.dumps(arena(each, names, judge), ensure_ascii=False) for each in judged]
    _write(folder / ARENA, "\n".join(lines) + "\n")
    result = {
        "model": names[0],
        "baseline": names[1],
        "judge": judge,
        **summary.as_dict(),
        "settings": settings,
    }
    _write(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def annotation(judged: Judged, names: tuple[str, str], judge: str) -> dict[str, Any]:
    """Row of `annotations.json`; AlpacaEval drops rows with a preference of null (no verdict)."""
    pair = judged.pair
    return {
        "instruction": pair.question.text,
        "output_1": pair.b,
        "generator_1": names[1],
        "output_2": pair.a,
        "generator_2": names[0],
        "annotator": judge,
        "preference": None if judged.preference is None else 1 + judged.preference,
    }


def leaderboard(summary: Summary, model: str) -> str:
    """Header and row of `leaderboard.csv`."""
    control = summary.length_controlled
    row = {
        "": model,
        "win_rate": 100 * summary.win_rate,
        "standard_error": _percent(summary.standard_error),
        "n_wins": summary.wins,
        "n_wins_base": summary.losses,
        "n_draws": summary.ties,
        "n_total": summary.wins + summary.losses + summary.ties,
        "discrete_win_rate": 100 * summary.discrete_win_rate,
        "mode": "community",
        "avg_length": round(summary.lengths[0]),
        "length_controlled_winrate": 100 * control.win_rate,
        "lc_standard_error": _percent(control.standard_error),
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue()


def arena(judged: Judged, names: tuple[str, str], judge: str) -> dict[str, Any]:
    """Line of `arena-hard.jsonl`; assistant A is the baseline in the first game."""
    identity = judged.pair.id
    return {
        "question_id": identity,
        "uid": identity,
        "category": judged.pair.question.category or _CATEGORY,
        "judge": judge,
        "model": names[0],
        "baseline": names[1],
        "games": [
            {"score": game.label, "judgment": {"answer": game.text}} for game in judged.games
        ],
    }


def _write(path: Path, text: str) -> None:
    with atomic_files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _percent(share: float | None) -> float | str:
    return "" if share is None else 100 * share
