"""The column `margin` of the data in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpref.config import Config
from fastpref.training.trainer import train
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


def write(tmp_path: Path, margins: list[float | None]) -> None:
    made: list[dict[str, Any]] = [
        {**row, "margin": margin} for row, margin in zip(rows(len(margins)), margins, strict=True)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", made)


def test_the_first_loss_of_dpo_with_an_offset_is_that_of_the_margins(
    tmp_path: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """Policy and reference are equal, so the reward margin is 0, and the loss softplus(2 m)."""
    margins = [0.0, 0.5, 1.0, 2.0]
    write(tmp_path, margins)
    config = make_config(loss={"name": "dpo", "offset": 2}, training__steps=1)
    with Display(Console()) as display:
        train(config, display)
    record = json.loads(
        (Path(config.training.output_dir) / "metrics.jsonl").read_text().split("\n")[0]
    )
    expected = sum(math.log1p(math.exp(2 * margin)) for margin in margins) / 4
    assert record["loss"] == pytest.approx(expected, abs=1e-6)
    assert record["rewards/margins"] == 0
    assert "margin of the data" not in capsys.readouterr().out


def test_margins_that_are_not_used_and_those_that_are_missing(
    tmp_path: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [1.0, None, 1.0, 1.0])
    with Display(Console(width=200)) as display:
        train(make_config(training__steps=1), display)
        assert "note: dpo does not use the column margin of the data; loss" in (
            capsys.readouterr().out
        )
        config = make_config(
            loss={"name": "dpo", "offset": 1}, training__output_dir=str(tmp_path / "other")
        )
        with pytest.raises(
            UserError, match=r"loss.offset: 1 of 4 pairs from .* have no margin; give"
        ):
            train(config, display)
