"""Log-probs of a model on all held-out pairs of a seed, one value a pair."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.evaluation.evaluate import score
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

Arrays = dict[str, list[float]]


def score_pairs(trainer: Trainer, path: Path) -> Arrays:
    """`pairs/chosen`, `pairs/rejected` (nats) and `pairs/entropy` (nats per token) of a policy."""
    groups = _groups(trainer, path)
    scores = score(trainer.policy, groups, trainer.config.training, Display(Console(quiet=True)))
    tokens = groups.response_lengths.reshape(-1, 2).sum(1)
    return {
        "pairs/chosen": _rounded(scores.logps[:, 0].tolist()),
        "pairs/rejected": _rounded(scores.logps[:, 1].tolist()),
        "pairs/entropy": _rounded((scores.entropies.sum(1).numpy() / tokens).tolist()),
    }


def describe_pairs(trainer: Trainer, path: Path) -> Arrays:
    """`pairs/cluster` and, of soft labels, `pairs/p`: what all runs of a seed share."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups = _groups(trainer, path)
    # Rows without room for a response are not among the groups.
    scored = [rows[groups[k].row - 1] for k in range(len(groups))]
    numbers: dict[str, int] = {}
    clusters = [numbers.setdefault(_cluster(row), len(numbers)) for row in scored]
    described: Arrays = {"pairs/cluster": [float(number) for number in clusters]}
    if all("p" in row for row in scored):
        described["pairs/p"] = [float(row["p"]) for row in scored]
    return described


def _groups(trainer: Trainer, path: Path) -> GroupDataset:
    config, tokenizer = trainer.config.data, trainer.run.tokenizer
    return load_groups(str(path), tokenizer, config, "pairwise", "test")


def _cluster(row: dict[str, object]) -> str:
    """The contrast of words of a pure-semantic pair; the prompt of any other."""
    words = row.get("words")
    return " ".join(sorted(map(str, words))) if isinstance(words, list) else str(row["prompt"])


def _rounded(values: list[float]) -> list[float]:
    """Seven significant digits: margins are differences of numbers that may be large."""
    return [float(f"{value:.7g}") for value in values]
