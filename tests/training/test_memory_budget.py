"""Automatic memory settings: chosen, saved, resumed, and lowered when memory runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import distributed
from fastpref.config import Config
from fastpref.model.policy import Policy
from fastpref.training import memory_budget
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.training_runs import assert_same, config_of, run, told

MakeConfig = Callable[..., Config]


@pytest.fixture(name="make_config")
def _automatic(make_config: MakeConfig) -> MakeConfig:
    """Configs whose memory settings are automatic."""
    auto = {"training__micro_batch_tokens": "auto", "training__activation_checkpointing": "auto"}
    return lambda **overrides: make_config(**{**auto, **overrides})


def settings(config: Config) -> tuple[int, int]:
    """Micro-batch and recomputed blocks that are saved with a run."""
    saved = json.loads((Path(config.training.output_dir) / "memory.json").read_text())
    return saved["micro_batch_tokens"], saved["recomputed_blocks"]


def run_out(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> list[int]:
    """Let memory run out in these forward passes that are trained; returns the passes so far."""
    forward, passes = Policy.forward, []

    def limited(self: Policy, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            passes.append(len(passes))
            if passes[-1] in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *arguments)

    monkeypatch.setattr(Policy, "forward", limited)
    return passes


def test_a_small_model_is_not_recomputed_and_runs_group_by_group(
    make_config: MakeConfig, display: Display
) -> None:
    config = make_config(training__steps=1)
    trainer = run(config, display)
    longest = int(max(trainer.run.train.plan.costs))
    assert settings(config) == (longest, 0)
    assert trainer.plan.max_tokens == longest


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"adapter": {"name": "lora", "r": 4, "dropout": 0.5}},
        {"update": "dpo_pg"},
        {"calibration": "rc"},
        {"loss": "kto"},
    ],
)
def test_a_step_that_is_repeated_changes_nothing(
    make_config: MakeConfig,
    display: Display,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    """The first half of a step has run when memory runs out: its gradients and draws are undone."""
    options = {"training__steps": 4, **change}
    whole = make_config(training__output_dir=str(tmp_path / "whole"), **options)
    run(whole, display)
    again = make_config(training__output_dir=str(tmp_path / "again"), **options)
    run_out(monkeypatch, {6})
    run(again, display)
    assert settings(whole)[1] == 0 and settings(again)[1] == 1
    assert_same(Path(again.training.output_dir), Path(whole.training.output_dir))


def test_memory_that_runs_out_again_lowers_more(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both blocks are recomputed, then nothing is left to lower: a group needs its tokens."""
    config = config_of(tiny_llama, tmp_path, tmp_path / "run")
    run_out(monkeypatch, {1, 2})
    message = told(config)
    assert "out of memory at step 1, which is repeated with" in message
    assert "2 of 2 blocks recomputed (CUDA out of memory" in message
    assert message.count("out of memory at step") == 2
    run_out(monkeypatch, {0, 1, 2})
    with pytest.raises(torch.OutOfMemoryError):
        told(config_of(tiny_llama, tmp_path, tmp_path / "other"))


def test_micro_batches_are_halved_down_to_the_longest_group(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        training__steps=1, training__batch_invariant=False, training__activation_checkpointing="off"
    )
    trainer = Trainer(config, display)
    before, longest = trainer.plan.max_tokens, max(trainer.plan.costs)
    assert before >= 2 * longest
    run_out(monkeypatch, {0})
    trainer.loop([])
    assert trainer.plan.max_tokens == max(before // 2, longest)
    assert settings(config) == (trainer.plan.max_tokens, 0)


def test_the_batch_of_an_objective_that_depends_on_it_is_not_halved(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another micro-batch would be another objective."""
    config = make_config(loss="beta_dpo", training__activation_checkpointing="off")
    trainer = Trainer(config, display)
    assert trainer.plan.max_tokens == 16384
    run_out(monkeypatch, {0})
    with pytest.raises(torch.OutOfMemoryError):
        trainer.loop([])


def test_settings_of_the_user_are_not_lowered(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(training__micro_batch_tokens=500, training__activation_checkpointing="off")
    trainer = Trainer(config, display)
    run_out(monkeypatch, {0})
    with pytest.raises(torch.OutOfMemoryError):
        trainer.loop([])


def test_other_errors_are_not_repeated(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config(), display)

    def broken(*_: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Policy, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.loop([])


def test_several_ranks_stop_and_say_how_to_go_on(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks may wait in a collective, so the step cannot be repeated."""
    config = make_config()
    trainer = Trainer(config, display)
    run_out(monkeypatch, {0})
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"out of memory at step 1 .*; resume=auto continues with "):
        trainer.memory.within(1, lambda: trainer._accumulate_gradient(False), lambda: None)
    monkeypatch.undo()
    assert settings(config)[1] == 1


def test_a_resumed_run_has_the_settings_of_its_start(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(training__steps=3, training__checkpoint_every=1)
    run(config, display)
    path = Path(config.training.output_dir) / "memory.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "recomputed_blocks": 1, "bytes": 10}))
    resumed = config.model_copy(update={"resume": "auto"})
    longer = {"training": config.training.model_copy(update={"steps": 4})}
    trainer = Trainer(resumed.model_copy(update=longer), display)
    assert trainer.memory.budget.recomputed_blocks == 1
    # Not on a device with less memory, nor for longer data, nor from a damaged file.
    for text in (
        json.dumps({**saved, "recomputed_blocks": 1, "bytes": 2**60}),
        json.dumps({**saved, "recomputed_blocks": 1, "micro_batch_tokens": 3}),
        "{",
    ):
        path.write_text(text)
        trainer = Trainer(resumed.model_copy(update=longer), display)
        assert trainer.memory.budget.recomputed_blocks == 0


def test_a_measured_step_corrects_the_prediction(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that take more than predicted: more blocks are recomputed; micro-batches stay."""
    config = make_config(training__steps=1)
    trainer = Trainer(config, display)
    memory = trainer.memory
    for batches in (m.batches for m in trainer.run.train.micro_batches(trainer.policy, 0)):
        memory._corrects = True
        memory.observe(batches)
    predicted = max(memory._fullest)
    memory._usable = 2 * predicted
    tokens = memory.micro_batch_tokens
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: predicted)
    memory.correct(steps=1)
    assert memory._corrects  # the optimizer's state is not there yet
    memory.correct(steps=2)
    assert memory.budget.recomputed_blocks == 0
    memory._corrects = True
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * predicted)
    memory.correct(steps=2)
    assert memory.budget.recomputed_blocks == 2
    assert memory.micro_batch_tokens == tokens


def test_a_model_that_cannot_be_traced_is_recomputed(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpref.plan import predict
    from fastpref.utils.errors import ModelError

    def untraceable(*_: Any, **__: Any) -> Any:
        raise ModelError("model: Odd cannot be traced without values: it reads them")

    monkeypatch.setattr(predict, "trace", untraceable)
    monkeypatch.setattr(memory_budget.MemoryBudget, "_surely_fits", lambda self: False)
    trainer = Trainer(make_config(), display)
    assert trainer.memory.budget.recomputed_blocks == 2
    assert trainer.memory.budget.micro_batch_tokens == 16384


# The limit leaves room for a part of the activations of a long pair.
_LIMITED = """
import json, resource, sys
from pathlib import Path
from rich.console import Console
from fastpref import config as configs
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
import fastpref.plan.predict, fastpref.trunk, transformers.models.llama.modeling_llama

config = configs.parse(json.loads(Path(sys.argv[1]).read_text()))
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = int(size.split()[1]) * 1024 + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
Trainer(config, Display(Console(quiet=True))).loop([])
"""
_MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 8192,
}


def _limited_run(tmp_path: Path, tokenizer: Any, mebibytes: int, **training: Any) -> Any:
    tmp_path.mkdir(exist_ok=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "one two three four five six seven eight nine ten " * 10
    row = {"prompt": text, "chosen": f" {text}", "rejected": f" not {text}"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    values = {
        "model": {
            "init": "random",
            "config": _MODEL,
            "tokenizer": str(tmp_path / "tokenizer"),
            "dtype": "float32",
        },
        "data": {
            "train": str(tmp_path / "pairs.jsonl"),
            "cache": str(tmp_path / "cache"),
            "max_length": 4000,
        },
        "loss": "dpo",
        "optim": {"name": "sgd"},
        "training": {"steps": 1, "device": "cpu", "output_dir": str(tmp_path / "run"), **training},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    return subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "config.json"), str(mebibytes)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )


def test_a_run_lives_within_ulimit(tmp_path: Path, tokenizer: Any) -> None:
    """Without recomputation the same step exceeds the limit."""
    done = _limited_run(tmp_path, tokenizer, 400)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run/memory.json").read_text())
    assert 0 < saved["recomputed_blocks"] <= 8
    refused = _limited_run(tmp_path / "other", tokenizer, 400, activation_checkpointing="off")
    assert refused.returncode == 1 and "DefaultCPUAllocator" in refused.stderr
