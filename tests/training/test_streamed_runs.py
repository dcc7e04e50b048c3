"""Runs on streamed data: the same steps after a stop, on any number of ranks, in little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastpref.config import Config
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, rows, scored, write_jsonl
from tests.helpers.training_runs import lose_power_after, records, run, told, weights

MakeConfig = Callable[..., Config]
KINDS = {"dpo": rows, "simpo": rows, "bco": labelled, "nca": scored}


def shards(folder: Path, count: int = 60, files: int = 3) -> str:
    """Parquet files with these pairs, as a pattern."""
    parts = rows(count)
    (folder / "shards").mkdir()
    for k in range(files):
        table = pa.Table.from_pylist(parts[k * count // files : (k + 1) * count // files])
        pq.write_table(table, folder / "shards" / f"part-{k}.parquet", row_group_size=7)
    return str(folder / "shards" / "*.parquet")


def test_a_resumed_run_is_the_same_to_the_bit(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "data__train": shards(tmp_path),
        "data__streaming": True,
        "data__shuffle_window": 16,
        "training__steps": 22,  # into the second epoch
        "training__log_every": 3,
        "training__checkpoint_every": 5,
    }
    whole = run(make_config(**options), display)
    expected = records(whole.config)
    options["training__output_dir"] = str(tmp_path / "stopped")
    stopped = Trainer(make_config(**options), display)
    lose_power_after(stopped, 18)
    with pytest.raises(RuntimeError, match="power cut"):
        stopped.loop([])
    resumed = run(make_config(**options, resume="auto"), display)
    assert records(resumed.config) == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_rows_is_streamed(
    make_config: MakeConfig, display: Display, tmp_path: Path, name: str
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", KINDS[name](24))
    config = make_config(
        loss=name, data__train=str(path), data__streaming=True, data__shuffle_window=8,
        data__eval=str(path), training__epochs=2,
    )  # fmt: skip
    run(config, display)
    lines = records(config)
    assert lines[-1]["step"] == 12 and lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_a_streamed_epoch_has_the_loss_of_the_same_rows_in_memory(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """With a learning rate near zero the losses of an epoch do not depend on the order."""
    path = write_jsonl(tmp_path / "d.jsonl", rows(24))
    losses = []
    for options in ({}, {"data__streaming": True, "data__shuffle_window": 12}):
        config = make_config(
            loss="simpo", data__train=str(path), optim__lr=1e-12,
            training__output_dir=str(tmp_path / f"run-{len(losses)}"), **options,
        )  # fmt: skip
        run(config, display)
        losses.append(sum(line["loss"] for line in records(config)) / 6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_streamed_run_says_what_it_reads(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        data__train=shards(tmp_path), data__streaming=True, data__shuffle_window=16,
        training__steps=1,
    )  # fmt: skip
    text = told(config)
    assert "train: 60 rows of" in text and "3 files, streamed; windows of 16 rows" in text
    assert config.reference_mode == "frozen"
