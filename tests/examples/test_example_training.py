"""Every config under examples/ trains two steps on a tiny model and rows of its format."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.plans import examples
from benchmarks.plans.shapes import SHAPES
from fastpref import config as configs
from fastpref import metrics
from fastpref.training.trainer import train
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, rows, scored, write_jsonl

Rows = list[dict[str, Any]]
PATHS = [*sorted(examples.EXAMPLES.glob("*.yaml")), *examples.paths()]
TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
# Loss of the first step, at which the policy is its reference, as the objectives define it.
AT_THE_REFERENCE = {
    "dpo": math.log(2),
    "dpo_norm": math.log(2),
    "apo_zero": 1.0,
    "kto": 0.5,
    "pro_p": math.log(2) / 4,
}


def tiny(path: str | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """A model with the architecture of another one, and two small blocks with random weights."""
    shape = SHAPES[path] if path is not None else config
    assert shape is not None
    kept = {"model_type": shape["model_type"]}
    # Gemma 2 has a default width of its heads; others divide the hidden size.
    kept |= {"head_dim": 8} if "head_dim" in shape else {}
    kept |= {"num_key_value_heads": 2} if "num_key_value_heads" in shape else {}
    return {"init": "random", "config": {**TINY, **kept}, "dtype": "float32"}


def conversations(count: int) -> Rows:
    """Pairs as lists of messages that repeat the prompt, beside the prompt as text."""
    pairs = []
    for row in rows(count):
        user = {"role": "user", "content": row["prompt"]}
        both = {
            name: [user, {"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        pairs.append({"prompt": row["prompt"], **both})
    return pairs


def transcripts(count: int) -> Rows:
    return [
        {
            name: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[name]}"
            for name in ("chosen", "rejected")
        }
        for row in rows(count)
    ]


# By data.train; others are conversations.
FORMATS: dict[str, Callable[[int], Rows]] = {
    "Anthropic/hh-rlhf": transcripts,
    "data/pure-semantic/train.jsonl": lambda count: rows(count, soft=True),
    "runs/demo/data/train.jsonl": lambda count: rows(count, soft=True),
    "data/smollm3-preferences.jsonl": rows,
    "data/hh-1-desired.jsonl": labelled,
    "data/uf-4.jsonl": scored,
    "data/magpie-pro-sft.jsonl": lambda count: [
        {"messages": row["chosen"]} for row in conversations(count)
    ],
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(examples.EXAMPLES)))
def test_a_config_trains(path: Path, tmp_path: Path, display: Display) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    data, model = values["data"], values["model"]
    generated = FORMATS.get(data["train"], conversations)(8)
    train_file = write_jsonl(tmp_path / "rows.jsonl", generated)
    values["model"] = tiny(model.get("path"), model.get("config"))
    values["data"] = data | {"train": str(train_file), "cache": str(tmp_path / "cache")}
    values["data"].pop("eval", None)
    values.get("adapter", {}).pop("quantize", None)  # 4 bits need a GPU
    if "8bit" in values["optim"].get("name", ""):
        values["optim"]["name"] = "adamw"
    values["training"] |= {
        "steps": 2,
        "batch_size": 4,
        "log_every": 1,
        "eval_every": None,
        "export_every": None,
        "checkpoint_every": None,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
    }
    config = configs.parse(values)
    train(config, display)
    lines = metrics.read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    expected = AT_THE_REFERENCE.get(config.build_loss().name)
    if expected is not None:
        assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
