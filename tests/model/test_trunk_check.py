"""Faults of the explicit blocks that show in long rows are seen in the first layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.data.dataset import TokenGroup
from fastpref.model.policy import Policy
from fastpref.model.trunk_check import first_layers, long_error, short_error, telling_depth
from fastpref.trunk import attention, build_trunk

ALLOWED = 1e-3  # `Policy.rounding` in fp32
COMMON = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 40,
}  # fmt: skip
TYPES = ["full_attention"] * 5 + ["sliding_attention"] * 3


def policy_of(kind: str, dtype: torch.dtype = torch.float32, **values: Any) -> Policy:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **values)
    policy = Policy(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype)
    policy.trunk, policy.layout = build_trunk(policy.base.base_model), "prefix_shared"
    return policy


def groups(length: int) -> list[TokenGroup]:
    """A group whose sequences have `length` tokens, and a short one."""
    ids = np.random.default_rng(0).integers(1, 384, length + 30).astype(np.int32)
    long = TokenGroup(0, 0, ids[: length - 30], (ids[length - 30 : length], ids[length:]))
    return [long, TokenGroup(1, 2, ids[:3], (ids[3:7], ids[7:9]))]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("llama", {}, 2),
        ("llama", {"num_hidden_layers": 1}, 1),
        ("mistral", {}, 2),
        ("gemma2", {}, 2),  # every second layer has a window
        ("olmo3", {}, 4),  # all but every fourth
        ("gemma3_text", {}, 6),  # all but every sixth
        ("qwen2", {"use_sliding_window": True, "layer_types": TYPES}, 6),
    ],
)
def test_as_many_layers_as_have_all_constants(
    kind: str, values: dict[str, Any], expected: int
) -> None:
    config = AutoConfig.for_model(kind, **{**COMMON, **values})
    model = AutoModelForCausalLM.from_config(config)
    assert telling_depth(build_trunk(model.base_model)) == expected


@pytest.mark.parametrize("layer", [6, 7])
@pytest.mark.parametrize("of", ["transformers", "blocks"])
def test_a_window_that_one_layer_does_not_have_is_seen(layer: int, of: str) -> None:
    """It shows in rows that are longer than the window only."""
    types = {"use_sliding_window": True, "layer_types": TYPES}
    policy = policy_of("qwen2", **types)
    assert policy.trunk is not None
    if of == "transformers":
        types["layer_types"] = [*TYPES[:layer], "full_attention", *TYPES[layer + 1 :]]
        policy.base.config.layer_types = types["layer_types"]
    else:
        block = list(policy.trunk.blocks.values())[layer].attention
        block.heads = block.heads._replace(window=None)
        block._options = block._options._replace(window=None)
    assert telling_depth(policy.trunk) == layer + 1
    assert long_error(policy, groups(36)) < 1e-5 and short_error(policy) < 1e-5
    assert long_error(policy, groups(90)) > 10 * ALLOWED


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_positions_that_are_wrong_after_some_length_are_seen(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, right = policy_of(kind), attention.rotate

    def clamped(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        index = torch.arange(len(cos)).clamp(max=40)
        right(query, key, cos[index], sin[index])

    monkeypatch.setattr(attention, "rotate", clamped)
    assert short_error(policy) < 1e-5 < ALLOWED < long_error(policy, groups(90))


def test_weights_of_late_layers_are_compared_on_few_tokens() -> None:
    policy = policy_of("llama")
    assert policy.trunk is not None
    layer: Any = policy.base.base_model.layers[7]
    block = policy.trunk.blocks[layer].attention
    block.heads = block.heads._replace(scale=3.0)
    block._options = block._options._replace(scale=3.0)
    assert short_error(policy) > ALLOWED


def test_half_precision_needs_all_layers_and_the_model_is_whole_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policy_of("llama", torch.bfloat16)
    layers = policy.base.base_model.layers
    seen: list[int] = []

    def noting(k: int, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        seen.append(k)
        return forward(*arguments, **options)

    for k, layer in enumerate(layers):
        monkeypatch.setattr(layer, "forward", partial(noting, k, layer.forward))
    assert long_error(policy, groups(40)) < 0.1
    assert set(seen) == set(range(8))
    with pytest.raises(KeyError), first_layers(policy.base.base_model, 3):
        assert len(policy.base.base_model.layers) == 3
        raise KeyError
    assert policy.base.base_model.layers is layers
