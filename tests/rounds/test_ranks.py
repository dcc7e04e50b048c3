"""Rounds on two ranks: the files of one process, also after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.faults.rounds import compare
from fastpref import distributed
from fastpref.config import Config
from fastpref.training import trainer
from tests.helpers import rank_processes
from tests.helpers.round_runs import config_of, play
from tests.rounds.test_loop import Killed, killed_at

# AdamW would make a whole step of a rounding error where a gradient is nearly 0.
OPTIM = {"name": "sgd", "lr": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "full": {
        "rounds": {"reference": {"ema": 0.5}},
        "parallel": {"reshard_after_forward": False},
    },
    "lora": {"adapter": {"r": 2, "dropout": 0.0}},
}


def make(llama: str, home: Path, case: str, name: str, **options: Any) -> Config:
    sections = {**CASES[case], **options}
    if distributed.world_size() == 1:
        sections.pop("parallel", None)
    held_out = {"eval": str(home / "prompts.jsonl")}
    return config_of(llama, home, name, data=held_out, optim=OPTIM, **sections)


@contextmanager
def ending_at(owner: Any, name: str, count: int) -> Iterator[None]:
    """Context manager that ends at the n-th call of a function, on every rank that calls it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, owner, name, count)
        yield


def on_ranks(rank: int, port: int, home: Path, llama: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with distributed.process_group():
        for case in CASES:
            play(make(llama, home, case, f"{case}-2"))
        with ending_at(trainer.Trainer, "_train_step", 2):
            play(make(llama, home, "full", "killed"))
        play(make(llama, home, "full", "killed", resume="auto"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Runs of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("rounds")
    for case in CASES:
        play(make(tiny_llama, folder, case, f"{case}-1"))
    rank_processes.start(on_ranks, 2, folder, tiny_llama)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_make_the_files_of_one_process(home: Path, case: str) -> None:
    ours, theirs = (
        {path.relative_to(run): path.read_bytes() for path in run.rglob("*.jsonl")}
        for run in (home / f"{case}-2" / "rounds", home / f"{case}-1" / "rounds")
    )
    assert ours == theirs and len(ours) == 16
    weights, expected = (
        load_file(home / f"{case}-{ranks}" / "model" / "model.safetensors") for ranks in (2, 1)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=0)


def test_ranks_that_are_killed_make_the_same_bits(home: Path) -> None:
    assert compare(home / "killed", home / "full-2") == []
