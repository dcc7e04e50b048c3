"""Gradients of adapters inside the products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from fastpref.trunk import UnknownLayer, build_trunk, linear
from tests.trunk import test_blocks as blocks


def test_adapters_of_a_group_with_different_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha_pattern of peft: q, k and v read the same input, each with a scale of its own."""
    monkeypatch.setitem(blocks.COMMON, "num_hidden_layers", 1)
    model = blocks.model_of("llama", lora=True)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] = {"q_proj": 0.5, "k_proj": 3.0}.get(name.split(".")[-1], 1.5)
    inputs = blocks.embeddings(blocks.PACKED, model, torch.float64)
    arguments = model, inputs, blocks.PACKED
    expected = blocks.hidden_and_gradients(blocks.expected_hidden, *arguments)
    ours = blocks.hidden_and_gradients(blocks.explicit_hidden, *arguments)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9)


def one_layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Llama of one layer with LoRA."""
    monkeypatch.setitem(blocks.COMMON, "num_hidden_layers", 1)
    return blocks.model_of("llama", lora=True)


def assert_equal_to_transformers(model: Any, explicit: Any = blocks.explicit_hidden) -> None:
    """Hidden states and gradients of the model's trained tensors are those of its own layers."""
    inputs = blocks.embeddings(blocks.PACKED, model, torch.float64)
    arguments = model, inputs, blocks.PACKED
    expected = blocks.hidden_and_gradients(blocks.expected_hidden, *arguments)
    ours = blocks.hidden_and_gradients(explicit, *arguments)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "q_proj.lora_B", "down_proj.lora_A"])
def test_either_matrix_of_an_adapter_is_trained_alone(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one_layer(monkeypatch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert_equal_to_transformers(model)


def _set_scales(model: Any) -> None:
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale("default", 3.0)


def _disable_one(model: Any) -> None:
    blocks.trunk_module(model).layers[0].self_attn.k_proj.enable_adapters(False)


@pytest.mark.parametrize("change", [_set_scales, _disable_one, lambda model: model.merge_adapter()])
def test_adapters_that_change_after_the_first_pass(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one_layer(monkeypatch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj.lora" not in name and "lora" in name)
    trunk = build_trunk(blocks.trunk_module(model))

    def explicit(_: Any, inputs: torch.Tensor, segments: Any) -> torch.Tensor:
        with blocks.ExactlyInFp64():
            return trunk(None, blocks.positions(segments), segments, inputs.dtype, inputs)

    assert_equal_to_transformers(model, explicit)
    change(model)
    if any(layer.merged for layer in model.modules() if hasattr(layer, "lora_A")):
        model.requires_grad_(False)  # no gradient reaches a merged adapter
    assert_equal_to_transformers(model, explicit)


def test_several_active_adapters_and_merged_ones_left_out_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = one_layer(monkeypatch)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trunk = build_trunk(blocks.trunk_module(model))
    model.base_model.set_adapter(["default", "second"])
    message = "has 2 active adapters, default and second"
    with pytest.raises(UnknownLayer, match=f"q_proj {message}"):
        build_trunk(blocks.trunk_module(model))
    ids = torch.ones(1, blocks.PACKED.tokens, dtype=torch.long)
    arguments = ids, blocks.positions(blocks.PACKED), blocks.PACKED, torch.float64
    with pytest.raises(UnknownLayer, match=f"q {message}"):
        trunk(*arguments)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(UnknownLayer, match="merged adapter, which cannot be left out"):
        trunk(*arguments)


def test_gradients_of_fp32_masters_are_not_rounded_to_half_precision() -> None:
    a, b = torch.full((1, 3), 1.0), torch.tensor([[1.0], [2.0**-9], [2.0**-9]])
    half = linear._product(a.bfloat16(), b.bfloat16(), torch.float32)
    assert half.dtype == torch.float32 and half.item() == 1 + 2.0**-8
    assert linear._product(a.bfloat16(), b.bfloat16(), torch.bfloat16).dtype == torch.bfloat16
    assert linear._product(a.double(), b.double(), torch.float32).dtype == torch.float64
