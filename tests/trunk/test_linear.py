"""Gradients of adapters inside the products."""

from __future__ import annotations

import pytest
import torch

from fastpref.trunk import linear
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


def test_gradients_of_fp32_masters_are_not_rounded_to_half_precision() -> None:
    a, b = torch.full((1, 3), 1.0), torch.tensor([[1.0], [2.0**-9], [2.0**-9]])
    half = linear._product(a.bfloat16(), b.bfloat16(), torch.float32)
    assert half.dtype == torch.float32 and half.item() == 1 + 2.0**-8
    assert linear._product(a.bfloat16(), b.bfloat16(), torch.bfloat16).dtype == torch.bfloat16
    assert linear._product(a.double(), b.double(), torch.float32).dtype == torch.float64
