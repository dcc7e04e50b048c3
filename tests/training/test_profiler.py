"""Profile of a training step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.config import Config
from fastpref.training.trainer import train
from fastpref.utils.progress import Display

PARTS = {"batch", "forward and loss", "backward", "clip and update"}


def test_a_profiled_run_leaves_a_trace_and_a_table(
    make_config: Callable[..., Config], display: Display, tmp_path: Path
) -> None:
    train(make_config(training__steps=7), display, profile=True)
    folder = tmp_path / "run" / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    marked = [event["name"] for event in events if event["name"].startswith("fastpref: ")]
    # Three steps of one micro-batch each, with every part.
    assert {name.removeprefix("fastpref: ") for name in marked} >= PARTS
    assert marked.count("fastpref: backward") == 3
    parts, operations = (folder / "table.txt").read_text().strip().split("\n\n")
    rows = [line.split(maxsplit=2) for line in parts.splitlines()[1:]]
    assert {name for _, _, name in rows} == PARTS
    assert all(float(milliseconds) > 0 for milliseconds, _, _ in rows)
    assert sum(float(share.rstrip("%")) for _, share, _ in rows) == pytest.approx(100, abs=0.5)
    assert len(operations.splitlines()) == 15


def test_a_run_is_not_profiled_by_default(
    make_config: Callable[..., Config], display: Display, tmp_path: Path
) -> None:
    train(make_config(training__steps=1), display)
    assert not (tmp_path / "run" / "profile").exists()
