"""The benchmark of architectures: its models, its judgment and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import architectures, tiny_models

RIGHT = {"difference": 1e-6, "layout": "prefix_shared", "kernels": "torch"}
REFUSED = {"refused": "model: XForCausalLM is not causal"}


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"],
                         "sliding_window": tiny_models.WINDOW}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
        ("deepseek_v3", {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8}),
        ("phi3, LongRoPE", {"original_max_position_embeddings": 24, "num_hidden_layers": 2}),
    ],
)  # fmt: skip
def test_a_tiny_config_has_a_layer_of_each_kind(name: str, entries: dict[str, Any]) -> None:
    config = tiny_models.tiny_config(name)
    assert {entry: getattr(config, entry) for entry in entries} == entries
    assert config.vocab_size == tiny_models.VOCABULARY


def test_weights_are_wide_enough_for_a_leak_to_show() -> None:
    layers = nn.Sequential(nn.Linear(40, 30), nn.Embedding(30, 40), nn.LayerNorm(40))
    nn.init.normal_(layers[0].weight, std=0.02)
    nn.init.normal_(layers[1].weight, std=0.3)
    tiny_models._widen(layers)
    spreads = [layers[k].weight.std().item() for k in (0, 1)]
    assert spreads == pytest.approx([tiny_models.STD, 0.3], rel=0.1)
    assert torch.equal(layers[2].weight, torch.ones(40))


def test_a_model_is_compared_in_the_layout_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "_parameters", lambda config: 0)  # seconds of imports
    architectures._save(0, "llama, dynamic NTK", tmp_path)
    with torch.random.fork_rng():
        result = architectures._difference(tmp_path)
    assert result["difference"] < architectures.LIMIT
    assert result["layout"] == "padded"
    assert result["reason"] == "its positions depend on the length of the sequence"
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ({"1": RIGHT, "2": REFUSED}, False),
        ({"1": {**RIGHT, "difference": 3.1e-5}}, True),
        ({"1": RIGHT, "2": {"failed": "no result within 240 s"}}, True),
        ({"1": {"not built": "ImportError"}}, False),
    ],
)
def test_a_model_is_right_or_refused_by_name(model: dict[str, Any], wrong: bool) -> None:
    assert architectures.is_wrong(model) is wrong


def test_the_table_has_the_models_that_build(tmp_path: Path) -> None:
    result = {
        "limit": 3e-5,
        "models": {
            "b": {"class": "B", "1": RIGHT, "2": REFUSED},
            "c": {"1": {"not built": "ImportError"}},
            "a": {"class": "A", "1": REFUSED},
        },
    }
    assert architectures.table(result).splitlines()[2:] == [
        "| a | `A` | | refused | | model: XForCausalLM is not causal |",
        "| b | `B` | prefix shared | 1e-06 | refused | |",
    ]
    assert architectures.summary(result["models"]) == (
        "2 of 3 build tiny: 1 are refused, 0 are wrong"
    )
    architectures.write(tmp_path / "r.json", result)
    assert json.loads((tmp_path / "r.json").read_text()) == result
