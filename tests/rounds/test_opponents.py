"""Opponents of Nash-MD: kills, the mixture with an adapter, judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.faults.rounds import compare
from fastpref import metrics
from fastpref.config import ConfigError
from fastpref.evaluation.comparisons import Group
from fastpref.rounds import artifacts, sequence
from fastpref.rounds.opponents import preferences
from fastpref.rounds.session import Session
from fastpref.utils.progress import Display
from tests.helpers.round_runs import play
from tests.rounds.test_loop import Killed, killed_at, rows_of
from tests.rounds.test_rollouts import PPO, with_rounds

LOSS = {"name": "nash_md", "mixture": 0.5}


def test_a_run_that_is_killed_makes_the_same_files_and_bits(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"loss": LOSS, "rounds": {"reference": {"every": 3}}}
    play(with_rounds(tiny_llama, tmp_path, "whole", **sections))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # Within the opponents of the second round, which need the copy of the checkpoint.
        killed_at(patch, artifacts.Shards, "append", 11)
        play(with_rounds(tiny_llama, tmp_path, "run", resume="auto", **sections))
    play(with_rounds(tiny_llama, tmp_path, "run", resume="auto", **sections))
    assert compare(tmp_path / "run", tmp_path / "whole") == []
    (record,) = (r for r in metrics.read_records(tmp_path / "run/rounds.jsonl") if r["round"] == 1)
    wins = preferences(
        [row["scores"] for row in rows_of(tmp_path, 1, "scores")],
        [row["scores"] for row in rows_of(tmp_path, 1, "opponents-scores")],
    )
    assert record["preference"] == pytest.approx(sum(map(sum, wins)) / 18)
    assert "clip_share" not in record
    drawn = [rows_of(tmp_path, 1, kind) for kind in ("samples", "opponents")]
    assert all(a["tokens"] != b["tokens"] for a, b in zip(*drawn, strict=True))


def test_a_preference_is_the_mean_over_the_opponents() -> None:
    assert preferences([[1.0, 0.0]], [[1.0, 1.0 + math.log(3.0)]]) == [
        [pytest.approx((0.5 + 0.25) / 2), pytest.approx((0.2689414 + 0.1092318) / 2)]
    ]


class Shorter:
    """Judge: the preference is that for the shorter text, 0.9."""

    fingerprint = "shorter"

    def compare(self, groups: Sequence[Group], check: Callable[[], None]) -> list[list[float]]:
        assert all(group.opponents is not None for group in groups)
        return [
            [
                sum(0.9 if len(text) < len(other) else 0.1 for other in group.opponents or ())
                / len(group.opponents or ())
                for text in group.completions
            ]
            for group in groups
        ]


def test_a_judge_compares_with_the_opponents(tiny_llama: str, tmp_path: Path) -> None:
    config = with_rounds(tiny_llama, tmp_path, loss=LOSS, rounds={"reference": "start"})
    session = Session(config, Display(Console(quiet=True)), None)
    round_ = sequence.Rounds(session, None, [], Shorter).round(1)
    assert round_.preferences == round_.scores and len(round_.scores) == 6
    cut = session.rounds.scorer.model_copy(update={"missing_eos_penalty": 0.5})
    session.rounds = session.rounds.model_copy(update={"scorer": cut})
    with pytest.raises(ConfigError) as caught:
        sequence.Rounds(session, None, [], Shorter).round(1)
    assert str(caught.value) == (
        "rounds.scorer.missing_eos_penalty: would be subtracted from the probabilities that a "
        "scorer of pairs gives nash_md with a mixture; remove it"
    )


def test_a_judge_of_one_sample_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    rounds = {"reference": "start", "sampling": {"samples": 1, "max_new_tokens": 5}}
    config = with_rounds(tiny_llama, tmp_path, loss=PPO, rounds=rounds)
    session = Session(config, Display(Console(quiet=True)), None)
    with pytest.raises(ConfigError, match=r"samples: a scorer of pairs compares the completions"):
        sequence.Rounds(session, None, [], Shorter).round(1)
