"""Tiny models, tokenizers and data, made on the spot; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tensors this small gain nothing from a second thread

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref import cli
from fastpref import config as configs
from fastpref.data import bpe
from fastpref.utils.progress import Display
from tests.bad_input.command import Shell
from tests.helpers.data import LLAMA, rows, write_jsonl

if not torch.cuda.is_available():  # decided when triton is imported, by whichever test is first
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Millions of objects of imported libraries, at which no collection need look again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [row[name] for row in rows(40) for name in ("prompt", "chosen", "rejected")]
    return bpe.train(texts, 384)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """Folder of a Llama of 30k fp32 weights, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    options = {**LLAMA, "initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def shell(
    tmp_path: Path,
    tiny_llama: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    """The command line in a folder of its own, with the tiny Llama at hand as `llama`."""
    (tmp_path / "llama").symlink_to(tiny_llama)
    return Shell(tmp_path, capsys, monkeypatch)


@pytest.fixture
def display() -> Display:
    return Display(Console(quiet=True))


@pytest.fixture
def fastpref(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedProcess[str]]:
    """The command line, without the seconds that a process of its own takes to import torch."""

    def run(*arguments: str, cwd: Path | None = None) -> CompletedProcess[str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["fastpref", *arguments])
        monkeypatch.chdir(cwd or Path.cwd())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        code = stop.value.code or 0
        return CompletedProcess(arguments, int(code), *capsys.readouterr())

    return run


@pytest.fixture
def make_config(tmp_path: Path, tiny_llama: str) -> Callable[..., configs.Config]:
    """A config for the tiny Llama on 12 pairs, 4 a step; overrides are `section__key=value`."""

    def make(**overrides: Any) -> configs.Config:
        path = tmp_path / "pairs.jsonl"
        if not path.exists():
            write_jsonl(path, rows(12))
        values: dict[str, Any] = {
            "model": {"path": tiny_llama, "dtype": "float32"},
            "data": {"train": str(path), "max_length": 64, "cache": str(tmp_path / "cache")},
            "loss": {"name": "dpo"},
            "optim": {"lr": 1e-3},
            "training": {
                "batch_size": 4,
                "activation_checkpointing": "off",
                "micro_batch_tokens": 4096,
                "log_every": 1,
                "device": "cpu",
                "checkpoint_every": None,
                "output_dir": str(tmp_path / "run"),
            },
        }
        for name, value in overrides.items():
            section, _, key = name.partition("__")
            if key:
                values.setdefault(section, {})[key] = value
            else:
                values[section] = value
        return configs.parse(values)

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real preference data, where the environment names one."""
    folder = os.environ.get("FASTPREF_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FASTPREF_DATA names no folder of real preference data")
    return Path(folder)


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of a real chat model with its tokenizer, where the environment names one."""
    folder = os.environ.get("FASTPREF_MODEL")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("FASTPREF_MODEL names no folder of a Hugging Face model")
    return folder
