"""Shares of the layers' weights that have adapters, and that are stored in 4 bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from fastpref import config as configs
from fastpref.model.lora import adapted_weights
from fastpref.model.policy import Policy

# Below this share the weights that are left out are named.
ENOUGH = 0.95


def announce_coverage(
    policy: Policy, adapter: configs.Adapter | None, say: Callable[[str], None]
) -> None:
    """Note which weights of the layers have no adapter, or more than 4 bits, if many have."""
    if adapter is None:
        return
    adapted = {id(weight) for weight in adapted_weights(policy)}
    share, others = _coverage(policy, lambda weight: id(weight) in adapted)
    if share < ENOUGH:
        advice = "; adapter.target_modules adds linear layers, adapter.target_parameters the others"
        say(
            f"note: adapters cover {share:.0%} of the weights of the layers, and not "
            f"{', '.join(others)}{'' if adapter.path else advice}"
        )
    if policy.quantized:
        share, others = _coverage(policy, lambda weight: hasattr(weight, "quant_state"))
        if share < ENOUGH:
            dtype = str(policy.compute_dtype).removeprefix("torch.")
            say(
                f"note: adapter.quantize stores {share:.0%} of the weights of the layers in 4 "
                f"bits, and {', '.join(others)} in {dtype}, since they are not in linear layers"
            )


def _coverage(policy: Policy, is_covered: Callable[[Any], bool]) -> tuple[float, list[str]]:
    """Share of covered weights, and names of the others, largest first."""
    covered, others = 0, dict[str, int]()
    for name, size, weight in _layer_weights(policy):
        if is_covered(weight):
            covered += size
        else:
            others[name] = others.get(name, 0) + size
    total = covered + sum(others.values())
    names = sorted(others, key=lambda name: -others[name])
    large = [name for name in names if others[name] > 0.01 * total]
    return covered / total if total else 1.0, large


def _layer_weights(policy: Policy) -> Iterator[tuple[str, int, Any]]:
    """Name in its block, number of elements, and weight, of all matrices in the blocks."""
    for block in policy.blocks():
        for name, weight in block.named_parameters():
            state = getattr(weight, "quant_state", None)
            shape = weight.shape if state is None else state.shape
            # Fused experts have a matrix of biases.
            if "lora_" not in name and not name.endswith("bias") and len(shape) > 1:
                plain = name.replace(".base_layer", "").removesuffix(".weight")
                yield re.sub(r"\.\d+(?=\.|$)", ".*", plain), prod(shape), weight
