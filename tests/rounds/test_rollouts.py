"""Whole runs of objectives on rollouts: kills, first steps, rewards that rise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.faults.rounds import compare
from fastpref import metrics
from fastpref.model.reference_policy import FrozenReference
from fastpref.online.learner import LearnerOptions, OnlineLearner
from fastpref.online.objectives import objective_of
from fastpref.rounds import artifacts, loop, rollout_trainer, sequence
from fastpref.rounds.session import Session
from fastpref.utils.progress import Display
from tests.helpers.round_runs import Letters, config_of, play
from tests.rounds.test_loop import Killed, killed_at, rows_of

NAMES = lambda loss: str(loss["name"])  # noqa: E731
PPO = {"name": "ppo", "kl_coef": 0.1, "value_lr": 0.1}
GRPO = {"name": "grpo", "beta": 0.1}


def with_rounds(llama: str, home: Path, name: str = "run", **sections: Any) -> Any:
    rounds = config_of(llama, home).rounds
    assert rounds is not None
    values = {**rounds.model_dump(mode="json", exclude_unset=True), **sections.pop("rounds", {})}
    return config_of(llama, home, name, rounds=values, **sections)


@pytest.mark.parametrize("loss", [PPO, GRPO], ids=NAMES)
def test_a_run_that_is_killed_makes_the_same_files_and_bits(
    loss: dict[str, Any], tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"loss": loss, "rounds": {"reference": "start"}}
    steps = (rollout_trainer.RolloutTrainer, "_accumulate_gradient")
    places: list[tuple[Any, str, int]] = [(*steps, 2)]
    if loss is PPO:
        places = [
            (*steps, 2),
            (sequence.Rounds, "_record", 1),  # after the last step of the first round
            (artifacts.RoundFiles, "write_tensors", 1),
            (*steps, 2),
        ]
    else:
        sections["rounds"] |= {"reference": {"ema": 0.9}, "count": 1, "steps": 3}
        sections["training"] = {"log_every": 2}
    play(with_rounds(tiny_llama, tmp_path, "whole", **sections))
    for owner, name, count in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, owner, name, count)
            play(with_rounds(tiny_llama, tmp_path, "killed", resume="auto", **sections))
    play(with_rounds(tiny_llama, tmp_path, "killed", resume="auto", **sections))
    assert compare(tmp_path / "killed", tmp_path / "whole") == []
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "whole/rounds/0001").iterdir()}
    assert {"prompts", "samples", "scores", "rollouts"} <= names
    assert "pairs" not in names


@pytest.mark.parametrize("loss", [PPO, GRPO], ids=NAMES)
def test_a_step_is_that_of_the_online_learner(
    loss: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    """In micro-batches of one prompt here, and of all responses there."""
    config = with_rounds(
        tiny_llama, tmp_path, loss=loss, training={"batch_size": 6},
        optim={"name": "sgd", "lr": 0.1, "max_grad_norm": None},
        rounds={"reference": "start", "count": 1},
    )  # fmt: skip
    folder = play(config)
    policy = Session(config, Display(Console(quiet=True)), None).policy
    before = {name: p.detach().clone() for name, p in policy.base.named_parameters()}
    reference = FrozenReference(copy.deepcopy(policy))
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=0.1)
    learner = OnlineLearner(
        policy, reference, objective_of(config.build_loss()), optimizer,
        LearnerOptions(max_grad_norm=1e9),
    )  # fmt: skip
    samples, scores = rows_of(tmp_path, 1, "samples"), rows_of(tmp_path, 1, "scores")
    learned = learner.update(
        [row["prompt_tokens"] for row in samples for _ in row["tokens"]],
        [tokens for row in samples for tokens in row["tokens"]],
        torch.tensor([score for row in scores for score in row["scores"]]),
        torch.arange(0, 3 * len(samples) + 1, 3),
    )
    (line,) = metrics.read_records(tmp_path / "run/metrics.jsonl")
    for name in ("loss", "grad_norm", "reward", "length", "kl"):
        assert line[name] == pytest.approx(learned[name], rel=1e-4, abs=1e-6), name
    trained = load_file(folder / "model.safetensors")
    for name, parameter in policy.base.named_parameters():
        step, theirs = trained[name] - before[name], parameter.detach() - before[name]
        torch.testing.assert_close(step, theirs, rtol=1e-3, atol=1e-6)


def test_log_probs_of_another_dtype_are_not_taken_for_the_policys(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"loss": PPO, "rounds": {"reference": "start", "count": 1}}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, rollout_trainer.RolloutTrainer, "_accumulate_gradient", 1)
        play(with_rounds(tiny_llama, tmp_path, **sections))
    play(with_rounds(tiny_llama, tmp_path, model={"dtype": "float64"}, **sections))
    assert len(list((tmp_path / "run/rounds/0001").glob("rollouts-*"))) == 2
    assert metrics.read_records(tmp_path / "run/metrics.jsonl")[0]["kl"] == 0.0


class Vowels(Letters):
    """Scorer: the share of vowels among the characters."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in completions]


@pytest.mark.parametrize(
    "loss", [PPO | {"kl_coef": 0.02, "lam": 1.0}, GRPO | {"beta": 0.01}], ids=NAMES
)
def test_the_reward_of_a_rule_rises(loss: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    sampling = {"samples": 8, "max_new_tokens": 2, "batch_size": 72}
    config = with_rounds(
        tiny_llama, tmp_path, loss=loss, optim={"lr": 8e-2},
        training={"batch_size": 9, "checkpoint_every": 100},
        rounds={"reference": "start", "count": 3, "prompts": 9, "steps": 2, "sampling": sampling},
    )  # fmt: skip
    loop.run(config, Display(Console(quiet=True)), scorer=Vowels)
    records = metrics.read_records(tmp_path / "run" / sequence.FILE)
    assert records[1]["reward"] < 0.2 and records[3]["reward"] > 0.35
    assert records[1]["kl"] == 0.0 < records[3]["kl"]
    assert ("value_explained" in records[1]) == (loss["name"] == "ppo")
    assert "pairs" not in records[1]
