"""Log-probs by pair, and what the pairs of a seed share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.data.collate import collate
from fastpref.reproduce.held_out import describe_pairs, score_pairs
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


@pytest.fixture
def trainer(make_config: Callable[..., Config], display: Display) -> Trainer:
    return Trainer(make_config(loss={"name": "dpo"}), display)


def test_values_are_those_of_one_pair_at_a_time(trainer: Trainer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "held-out.jsonl", rows(9)[3:])
    arrays = score_pairs(trainer, path)
    assert {name: len(values) for name, values in arrays.items()} == {
        "pairs/chosen": 6,
        "pairs/rejected": 6,
        "pairs/entropy": 6,
    }
    groups = trainer.run.train.groups  # the first twelve rows, of which these are some
    for k in range(6):
        batch = collate([groups[3 + k]], "pairwise")
        with torch.no_grad():
            logps = trainer.policy(batch).logps.tolist()
        measured = [arrays["pairs/chosen"][k], arrays["pairs/rejected"][k]]
        assert measured == pytest.approx(logps, rel=1e-5)
    assert all(0 < value < 6 for value in arrays["pairs/entropy"])


def test_clusters_are_prompts_or_contrasts_of_words(trainer: Trainer, tmp_path: Path) -> None:
    plain: list[dict[str, Any]] = [{**row, "prompt": f"{k // 2}"} for k, row in enumerate(rows(4))]
    path = write_jsonl(tmp_path / "a.jsonl", plain)
    assert describe_pairs(trainer, path) == {"pairs/cluster": [0, 0, 1, 1]}
    words = (["tea", "milk"], ["milk", "tea"], ["tea", "cola"], ["cola", "milk"])
    soft = [{**row, "words": w, "p": 0.75} for row, w in zip(rows(4), words, strict=True)]
    path = write_jsonl(tmp_path / "b.jsonl", soft)
    assert describe_pairs(trainer, path) == {"pairs/cluster": [0, 0, 1, 2], "pairs/p": [0.75] * 4}


def test_rows_without_room_for_a_response_are_left_out_of_both(
    trainer: Trainer, tmp_path: Path
) -> None:
    data = [{**row, "prompt": f"{k}"} for k, row in enumerate(rows(3))]
    data[1]["prompt"] = "long " * 500
    data[2]["prompt"] = data[0]["prompt"]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    assert describe_pairs(trainer, path) == {"pairs/cluster": [0, 0]}
    assert len(score_pairs(trainer, path)["pairs/chosen"]) == 2
