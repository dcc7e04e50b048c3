"""Predictions for reward models: a head of one row, and prompts that their responses share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.data.tokenizers import load_tokenizer
from fastpref.model.load import load_policy
from fastpref.model.reward_policy import set_padding_token
from fastpref.plan.devices import GPUS
from fastpref.plan.head import RewardHead
from fastpref.plan.model_shapes import Shapes, empty_policy, shapes_of
from fastpref.plan.predict import Predictor, Setup
from fastpref.plan.workload import GroupLengths, Pass
from fastpref.training.memory_budget import MemoryBudget
from fastpref.utils.progress import Display

MakeConfig = Callable[..., Config]
D, V = 32, 384  # of the tiny Llama
RL = {"loss": {"name": "plackett_luce"}}
LORA = {"name": "lora", "r": 4}


def shapes(config: Config, in_4bit: bool = False) -> Shapes:
    policy = empty_policy(
        config.model, None, False, adapter=config.adapter, recomputed=False, of_rewards=True
    )
    return shapes_of(policy, in_4bit)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_shapes_are_those_of_the_reward_model_that_trains(
    make_config: MakeConfig, adapter: Any
) -> None:
    config = make_config(**RL, adapter=adapter, model__dtype="bfloat16")
    tokenizer: Any = load_tokenizer(config.model)
    set_padding_token(tokenizer)
    options: dict[str, Any] = {"adapter": config.adapter, "of_rewards": True}
    policy = load_policy(
        config.model, tokenizer, torch.device("cpu"), config.training, config.parallel, **options
    )
    counted, parameters = shapes(config), dict(policy.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert counted.trained == sum(p.numel() for p in trained.values())
    frozen = [p for name, p in parameters.items() if name not in trained]
    assert counted.base_bytes == sum(p.nbytes for p in (frozen if adapter else trained.values()))
    if adapter:  # the head is trained in full beside the adapters, in fp32
        matrices = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
        assert counted.adapter == matrices + D and counted.adapter_stored == 4
    assert (counted.vocabulary, counted.head_rows, counted.head) == (V, 1, D)


def test_a_base_in_4_bits_keeps_its_head(make_config: MakeConfig) -> None:
    counted = shapes(make_config(**RL, adapter={**LORA, "quantize": "nf4"}), in_4bit=True)
    linear = 2 * (2 * D * D + 2 * D * 16 + 3 * D * 64)  # q, o; k, v of two heads of 8; mlp
    assert counted.quantized == linear and counted.base == V * D + linear + 5 * D


def predictions(config: Config, lengths: GroupLengths) -> Any:
    return Predictor(GPUS["4090"], None)(Setup(config, lengths, 1))


def test_the_head_reads_one_token_of_a_response(make_config: MakeConfig) -> None:
    lengths = GroupLengths.uniform("groupwise", 4, 20, [10, 10, 10])
    config = make_config(**RL, training__batch_size=4)
    predict, setup = Predictor(GPUS["4090"], None), Setup(config, lengths, 1)
    [[[one]]] = [predict_steps(setup)]
    assert one == Pass(4 * 50, 12, one.attended)
    memory = predict.memory(setup, 0)
    assert isinstance(memory.head, RewardHead)
    assert memory.head.saved(one) == 12 * D * 4
    assert memory.head.forward(one) == 200 * D * 4 + 12 * D * 4
    # Forward and backward of a product of 12 hidden states with one row.
    assert predict(setup).flops.head == 3 * 2 * 12 * D


def predict_steps(setup: Setup) -> Any:
    from fastpref.plan.workload import steps_of

    training = setup.config.training
    [step] = steps_of(training, 4096, setup.layout, setup.lengths, 1, False, of_rewards=True)
    return [*step]


def test_no_product_with_the_vocabulary_takes_memory(make_config: MakeConfig) -> None:
    """What a language model adds: its head, with gradient and moments, and logits."""
    lengths = GroupLengths.uniform("groupwise", 4, 20, [10, 10, 10])
    language = predictions(make_config(loss={"name": "info_nca"}), lengths)
    reward = predictions(make_config(**RL), lengths)
    assert language.parts.weights - reward.parts.weights == 4 * D * (V - 1)
    assert reward.parts.head < 12 * D * 4 + 2 * 200 * D * 4
    assert reward.flops.trunk == language.flops.trunk
    assert reward.flops.attention == language.flops.attention


def test_the_first_steps_on_a_gpu_correct_the_prediction_by_responses(
    make_config: MakeConfig,
) -> None:
    batch: Any = type("Batch", (), {"cu_seqlens": np.zeros(8), "labels": np.zeros(90)})
    budget = MemoryBudget.__new__(MemoryBudget)
    setup = Setup(make_config(**RL), GroupLengths.uniform("groupwise", 1, 2, [3]), 1)
    budget._setup = setup
    assert budget._scored(batch) == 7
    budget._setup = replace(setup, config=make_config())
    assert budget._scored(batch) == 90


def test_the_command_plans_a_reward_model(
    fastpref: Any, make_config: MakeConfig, tmp_path: Path, display: Display
) -> None:
    path, out = tmp_path / "plan.yaml", tmp_path / "plan.json"
    path.write_text(make_config(loss={"name": "bradley_terry"}).to_yaml())
    done = fastpref("plan", str(path), "--device", "4090", "--json", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["fits"] and record["steps"] == 3 and record["reference_seconds"] == 0
