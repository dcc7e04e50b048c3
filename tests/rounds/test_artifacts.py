"""Files of a round: leftovers of kills, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastpref.rounds.artifacts import RoundFiles
from fastpref.utils.errors import UserError


def test_the_shards_of_a_complete_file_are_removed_when_it_is_read(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path, 1)
    files.shards("samples", "k").append([{"a": 1}])
    assert files.read("samples", "k") is None
    assert files.shards("samples", "k").read() == [{"a": 1}]
    files.write("samples", "k", [{"a": 1}])  # and the process is killed here
    assert files.read("samples", "k") == [{"a": 1}]
    assert [path.name for path in files.folder.iterdir()] == ["samples-k.jsonl"]


def test_tensors_that_are_damaged(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path, 1)
    assert files.read_tensors("rollouts", "k") is None
    files.write_tensors("rollouts", "k", {"values": torch.arange(3.0)})
    read = files.read_tensors("rollouts", "k")
    assert read is not None and read["values"].tolist() == [0.0, 1.0, 2.0]
    path = files.path("rollouts", "k", ".safetensors")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="is damaged; remove it, and the run makes it again if the"):
        files.read_tensors("rollouts", "k")
