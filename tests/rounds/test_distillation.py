"""Runs of rounds toward a teacher: a step, a kill, teachers that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.faults.rounds import compare
from fastpref import metrics
from fastpref.config import ConfigError
from fastpref.online.distillation import DistillationLearner
from fastpref.rounds import distillation_trainer
from fastpref.rounds.session import Session
from fastpref.training.base_weights import fingerprints
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.round_runs import play
from tests.rounds.test_loop import Killed, killed_at, rows_of
from tests.rounds.test_rollouts import with_rounds


def teacher_of(llama: str, home: Path, **changes: Any) -> str:
    """A model of another width with the tokenizer of the Llama."""
    folder = home / "teacher"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    options = AutoConfig.from_pretrained(folder).to_dict()
    options |= {"hidden_size": 48, "intermediate_size": 64, **changes}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    model.save_pretrained(folder)
    return str(folder)


def test_a_step_is_that_of_the_learner_and_a_kill_changes_nothing(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {
        "name": "distillation", "teacher": teacher_of(tiny_llama, tmp_path),
        "divergence": "jsd", "beta": 0.3, "temperature": 2.0,
    }  # fmt: skip
    sections: dict[str, Any] = {
        "loss": loss,
        "training": {"batch_size": 6},
        "rounds": {"steps": 2, "count": 1},
    }
    config = with_rounds(tiny_llama, tmp_path, **sections)
    play(config)
    session = Session(config, Display(Console(quiet=True)), None)
    assert session.teacher is not None
    learner = DistillationLearner(
        session.policy, session.teacher, torch.optim.SGD(session.policy.parameters(), 0.1), "jsd",
        beta=0.3, temperature=2.0,
    )  # fmt: skip
    samples = rows_of(tmp_path, 1, "samples")
    learned = learner.update(
        [row["prompt_tokens"] for row in samples for _ in row["tokens"]],
        [tokens for row in samples for tokens in row["tokens"]],
    )
    lines = metrics.read_records(tmp_path / "run/metrics.jsonl")
    for name in ("loss", "grad_norm", "length"):
        assert lines[0][name] == pytest.approx(learned[name], rel=1e-4), name
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[0]["entropy"] > 0
    records = metrics.read_records(tmp_path / "run/rounds.jsonl")
    assert records[1]["loss"] == pytest.approx((lines[0]["loss"] + lines[1]["loss"]) / 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, distillation_trainer.DistillationTrainer, "losses", 8)
        play(with_rounds(tiny_llama, tmp_path, "killed", **sections))
    play(with_rounds(tiny_llama, tmp_path, "killed", resume="auto", **sections))
    assert compare(tmp_path / "killed", tmp_path / "run") == []


def test_a_teacher_with_other_tokens_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_llama, tmp_path, vocab_size=1024)
    loss = {"name": "distillation", "teacher": teacher}
    config = with_rounds(tiny_llama, tmp_path, loss=loss)
    display = Display(Console(quiet=True))
    with pytest.raises(ConfigError, match=r"loss.teacher: its head has 1,024 tokens, and that of"):
        Session(config, display, None)
    path = Path(teacher) / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    a, b = [token for token, index in vocabulary.items() if index in (20, 21)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"loss.teacher: token 20 is .* in the model; use two"):
        Session(config, display, None)


def test_prompts_leave_room_for_the_positions_of_the_teacher(
    tiny_llama: str, tmp_path: Path
) -> None:
    teacher = teacher_of(tiny_llama, tmp_path, max_position_embeddings=15)
    config = with_rounds(tiny_llama, tmp_path, loss={"name": "distillation", "teacher": teacher})
    with pytest.raises(UserError, match=r"no prompt of .* has at most 10 tokens"):
        Session(config, Display(Console(quiet=True)), None)


def test_the_weights_of_a_teacher_below_home_are_known(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run compares them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher_of(tiny_llama, tmp_path)
    loss = {"name": "distillation", "teacher": "~/teacher"}
    assert "loss.teacher" in fingerprints(with_rounds(tiny_llama, tmp_path, loss=loss))
