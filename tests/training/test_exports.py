"""Exports of a run: during training, of its checkpoints, and after kills."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref import config as configs
from fastpref import distributed, metrics
from fastpref.config import Config
from fastpref.training import exports, run_lock
from fastpref.training.exports import export_step
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.bad_input.command import Shell
from tests.helpers import rank_processes
from tests.helpers.data import LLAMA, rows, write_jsonl
from tests.helpers.training_runs import flip, run, weights

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "merged": {"name": "lora", "r": 4},
    "dora": {"name": "lora", "r": 4, "dora": True},
    "alone": {"name": "lora", "r": 4, "merge": False},
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights in a Hugging Face folder."""
    values: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        values |= load_file(path)
    assert values
    return values


def assert_same_export(ours: Path, expected: Path) -> None:
    """The same files; the card alone may differ, which names the run."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        if name != "README.md":
            assert (ours / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_export_is_that_of_a_run_which_ends_there(
    make_config: MakeConfig, display: Display, tmp_path: Path, tiny_llama: str, kind: str
) -> None:
    """Of step 2 of 4, during training and from the checkpoint; training goes on as without."""
    options: dict[str, Any] = {"adapter": ADAPTERS[kind], "optim__lr": 1e-2}
    short = make_config(training__steps=2, training__output_dir=str(tmp_path / "short"), **options)
    run(short, display)
    plain = run(
        make_config(training__steps=4, training__output_dir=str(tmp_path / "plain"), **options),
        display,
    )
    config = make_config(
        training__steps=4, training__export_every=2, training__checkpoint_every=2, **options
    )
    exporting = run(config, display)
    assert all(torch.equal(weights(plain)[n], w) for n, w in weights(exporting).items())
    folder, expected = tmp_path / "run", tmp_path / "short" / "model"
    assert sorted(path.name for path in (folder / "exports").iterdir()) == ["step-2", "step-4"]
    assert_same_export(folder / "exports" / "step-2", expected)
    assert_same_export(folder / "exports" / "step-4", folder / "model")
    export_step(folder, 2, tmp_path / "out", CPU, display)
    assert_same_export(tmp_path / "out", expected)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card == (folder / "exports" / "step-2" / "README.md").read_text("utf-8")
    loss = metrics.read_records(folder / "metrics.jsonl")[1]["loss"]
    assert f"| loss | {loss:.6g} |" in card
    model = AutoModelForCausalLM.from_pretrained(tiny_llama if kind == "alone" else expected)
    if kind == "alone":
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_bfloat16_export_says_so(make_config: MakeConfig, display: Display) -> None:
    trainer = Trainer(make_config(model__dtype="bfloat16"), display)
    folder = trainer.export()
    assert {value.dtype for value in tensors(folder).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_checkpoint_is_exported_while_the_run_holds_its_lock(
    make_config: MakeConfig, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the run deletes the checkpoint after the export has begun."""
    run(make_config(training__steps=2, training__checkpoint_every=1), display)
    folder, original = tmp_path / "run", exports.load_policy

    def deleting(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(folder / "checkpoints" / "step-2")
        return original(*arguments, **options)

    monkeypatch.setattr(exports, "load_policy", deleting)
    with run_lock.hold(folder):
        export_step(folder, 2, folder / "exports" / "step-2", CPU, display)
    assert_same_export(folder / "exports" / "step-2", folder / "model")
    assert [path.name for path in (folder / "exports").iterdir()] == ["step-2"]


def test_a_file_system_without_hard_links(
    make_config: MakeConfig, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(training__steps=1, training__checkpoint_every=1), display)

    def refusing(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refusing)
    export_step(tmp_path / "run", 1, tmp_path / "out", CPU, display)
    assert_same_export(tmp_path / "out", tmp_path / "run" / "model")


def test_what_cannot_be_exported(
    make_config: MakeConfig, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(training__steps=3, training__checkpoint_every=1), display)
    folder, out = tmp_path / "run", tmp_path / "out"
    checkpoints = folder / "checkpoints"

    def said(run: Path, step: int, target: Path = out) -> str:
        with pytest.raises(UserError) as caught:
            export_step(run, step, target, CPU, display)
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return str(caught.value)

    assert said(tmp_path / "nowhere", 1).endswith(
        "nowhere: no such run; expected a folder with config.yaml and checkpoints, as "
        "`fastpref train` writes it"
    )
    assert said(folder, 1) == (
        f"--step: {folder} has no checkpoint of step 1; it has 2, 3, choose one"
    )
    assert said(folder, 2, folder / "model") == (
        f"--output: {folder / 'model'} is already there; choose another folder"
    )
    flip(next((checkpoints / "step-3").glob("*.safetensors")), 100)
    assert "safetensors is damaged; choose another step" in said(folder, 3)
    (checkpoints / "step-3" / "state.json").unlink()
    assert "is missing; choose another step" in said(folder, 3)

    def vanishing(source: Path, target: Path) -> None:
        shutil.rmtree(source.parent)
        raise FileNotFoundError(source)

    monkeypatch.setattr(os, "link", vanishing)
    assert said(folder, 2) == (
        f"--step: {checkpoints / 'step-2'} was deleted by the run while it was read; choose a "
        "later step, or raise training.keep_checkpoints"
    )
    shutil.rmtree(checkpoints)
    assert said(folder, 2).endswith("has no checkpoint of step 2; it has none, choose one")


def test_a_trained_tokenizer_needs_the_data_of_the_run(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    config = make_config(
        model={"init": "random", "config": LLAMA, "dtype": "float32"},
        training__steps=1,
        training__checkpoint_every=1,
    )
    run(config, display)
    export_step(tmp_path / "run", 1, tmp_path / "out", CPU, display)
    assert_same_export(tmp_path / "out", tmp_path / "run" / "model")
    write_jsonl(Path(config.data.train), rows(13))
    with pytest.raises(UserError, match=r"data\.train: .* has changed since the run, whose token"):
        export_step(tmp_path / "run", 1, tmp_path / "again", CPU, display)


def test_a_resumed_run_has_the_exports_of_an_uninterrupted_one(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """Killed within the export of step 6, with a checkpoint of step 4 and an export of step 5."""
    options: dict[str, Any] = {
        "training__steps": 7,
        "training__checkpoint_every": 4,
        "training__export_every": 1,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(make_config(training__output_dir=str(whole), **options), display)
    trainer = Trainer(make_config(training__output_dir=str(broken), **options), display)
    leftover, exporter = broken / ".step-6.1.tmp", trainer.exporter

    def killed(step: int) -> Path:
        if step == 6:
            leftover.mkdir()
            raise KeyboardInterrupt
        return exporter.write_step(step)

    trainer.exporter = _Killed(killed)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.loop([])
    assert leftover.exists()
    names = [path.name for path in sorted((broken / "exports").iterdir())]
    assert names == [f"step-{k}" for k in range(1, 6)]
    resumed = make_config(training__output_dir=str(broken), resume="auto", **options)
    again = Trainer(resumed, display)
    left = [path.name for path in sorted((broken / "exports").iterdir())]
    assert left == ["step-1", "step-2", "step-3", "step-4"] and not leftover.exists()
    again.loop([])
    for step in range(1, 8):
        assert_same_export(broken / "exports" / f"step-{step}", whole / "exports" / f"step-{step}")


class _Killed:
    """Exporter of a run that ends within an export."""

    def __init__(self, write_step: Callable[[int], Path]) -> None:
        self.write_step = write_step


def ranks_config(home: Path, name: str, llama: str, steps: int, **options: Any) -> Config:
    data = str(home / "d.jsonl")
    values: dict[str, Any] = {
        "model": {"path": llama, "dtype": "float32"},
        "data": {"train": data, "eval": data, "max_length": 64, "cache": str(home / "cache")},
        "loss": "simpo",
        "optim": {"lr": 1e-2},
        "training": {
            "steps": steps,
            "batch_size": 4,
            "device": "cpu",
            "export_every": 2,
            "checkpoint_every": 2,
            "output_dir": str(home / name),
            **options.pop("training", {}),
        },
        **options,
    }
    return configs.parse(values)


RANKS: dict[str, dict[str, Any]] = {
    "full": {},
    "merged": {"adapter": {"name": "lora", "r": 4}},
    "alone": {
        "adapter": {"name": "lora", "r": 4, "merge": False},
        # An evaluation leaves weights gathered, which the export must change on all ranks or none.
        "training": {"eval_every": 1, "export_every": 1},
    },
}


def train_on_ranks(rank: int, port: int, home: Path, llama: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    display = Display(Console(quiet=True))
    with distributed.process_group():
        for name, options in RANKS.items():
            run(ranks_config(home, f"{name}-2", llama, 2, **options), display)
            run(ranks_config(home, f"{name}-4", llama, 4, **options), display)


def test_exports_of_a_sharded_run(tmp_path: Path, tiny_llama: str, display: Display) -> None:
    """Of two ranks, whose checkpoint one process exports bit for bit."""
    write_jsonl(tmp_path / "d.jsonl", rows(12))
    rank_processes.start(train_on_ranks, 2, tmp_path, tiny_llama)
    for name in RANKS:
        exported, ended = tmp_path / f"{name}-4" / "exports", tmp_path / f"{name}-2" / "model"
        every = 1 if name == "alone" else 2
        assert {path.name for path in exported.iterdir()} == {
            f"step-{step}" for step in range(every, 5, every)
        }
        assert_same_export(exported / "step-2", ended)
        assert_same_export(exported / "step-4", tmp_path / f"{name}-4" / "model")
        export_step(tmp_path / f"{name}-4", 2, tmp_path / f"{name}-out", CPU, display)
        ours, expected = tensors(tmp_path / f"{name}-out"), tensors(ended)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_the_command(make_config: MakeConfig, display: Display, shell: Shell) -> None:
    run(make_config(training__steps=2, training__checkpoint_every=1), display)
    outcome = shell("export", "run", "--step", "1")
    assert (outcome.code, outcome.out) == (0, "model: run/exports/step-1\n")
    assert outcome.err == ""
    shell("export", "run", "--step", "2", "--output", "out")
    assert_same_export(shell.folder / "out", shell.folder / "run" / "model")
