"""Reference log-probs that were damaged on disk are recomputed, not trained on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.model import reference_policy
from fastpref.training.setup import precompute
from fastpref.utils.progress import Display
from tests.helpers.training_runs import flip

MakeConfig = Callable[..., Config]


@pytest.fixture
def cached(make_config: MakeConfig, display: Display, tmp_path: Path) -> Path:
    precompute(make_config(), display)
    (path,) = (tmp_path / "cache" / "reference").iterdir()
    return path


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_recomputed(
    cached: Path, make_config: MakeConfig, display: Display, damage: str
) -> None:
    before = load_file(cached)["logps"].clone()
    if damage == "flipped":
        flip(cached, -10)
    else:
        os.truncate(cached, 100 if damage == "cut" else 0)
    precompute(make_config(), display)
    assert torch.equal(load_file(cached)["logps"], before)


def test_no_flipped_bit_goes_unseen(cached: Path, display: Display) -> None:
    for position in range(cached.stat().st_size):
        flip(cached, position)
        tensors = reference_policy._read(cached, display)
        flip(cached, position)
        # Some bits of the header are ignored: spaces at its end.
        assert tensors is None or torch.equal(tensors["logps"], load_file(cached)["logps"])
    assert reference_policy._read(cached, display) is not None


def test_a_damaged_partial_file_is_recomputed(
    cached: Path, make_config: MakeConfig, display: Display
) -> None:
    before = load_file(cached)["logps"].clone()
    cached.rename(cached.with_suffix(".partial"))
    flip(cached.with_suffix(".partial"), -10)
    precompute(make_config(), display)
    assert torch.equal(load_file(cached)["logps"], before)
