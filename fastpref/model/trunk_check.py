"""Comparison of the explicit blocks with the layers of transformers.

Two passes: a few tokens go through all layers, and long rows through the first ones only. Whatever
depends on the length of a row - a window, a mask, the rotary angles - is code and constants of a
layer, and the first layers are as many as have all codes and constants of the model. The error of
other weights shows in the few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastpref.data.dataset import TokenGroup
from fastpref.model.packed_attention import packing_error
from fastpref.trunk import Trunk

if TYPE_CHECKING:
    from fastpref.model.policy import Policy

_CONSTANTS = (bool, int, float, str, type(None))
# What numbers the layers, or says how they are trained.
_WITHOUT_EFFECT = {"layer_idx", "training", "gradient_checkpointing"}


def short_error(policy: Policy) -> float:
    """Relative error of hidden states that all explicit blocks compute of a few tokens."""
    ids = np.arange(1, 33, dtype=np.int32) % policy.vocabulary
    group = TokenGroup(0, 0, ids[:11], (ids[11:20], ids[20:]))
    return packing_error(policy.base, [group], policy.explicit_row)


def long_error(policy: Policy, groups: Sequence[TokenGroup]) -> float:
    """Relative error of hidden states of long rows.

    Of the first layers it is scaled to the depth of the model, as if each layer added as much.
    """
    assert policy.trunk is not None
    model: Any = policy.base.base_model
    layers = len(model.layers)
    # The rounding of one layer to half precision is as large as the errors to be seen.
    in_half = policy.checked_dtype == torch.bfloat16
    depth = layers if in_half else telling_depth(policy.trunk)
    with first_layers(model, depth):
        error = packing_error(policy.base, groups, policy.explicit_row)
    return error * layers / depth


def telling_depth(trunk: Trunk) -> int:
    """Number of the first layers that have all codes and constants of the layers; at least 2.

    The second of them computes with what the attention of the first has mixed.
    """
    layers: Any = trunk.model.layers
    kinds = [_kind(trunk, number, layer) for number, layer in enumerate(layers)]
    last = max(kinds.index(kind) for kind in kinds)
    return min(len(layers), max(2, last + 1))


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[None]:
    """Context manager in which a trunk of transformers, and of ours, has its first layers only."""
    layers: nn.ModuleList = model.layers
    model.layers = layers[:count]
    try:
        yield
    finally:
        model.layers = layers


def _kind(trunk: Trunk, number: int, layer: nn.Module) -> tuple[Any, ...]:
    """Code and constants of a layer: equal ones compute the same with equal weights."""
    block = trunk.blocks[layer]
    ours = block.kind, block.attention.heads, block.mlp.activation
    modules = [
        (name, type(module), _constants(module))
        for name, module in layer.named_modules()
        if "lora_" not in name
    ]
    options = vars(trunk.model.config).values()
    by_layer = [
        values[number]
        for values in options
        if isinstance(values, list | tuple) and len(values) == len(trunk.blocks)
    ]
    return ours, modules, by_layer


def _constants(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _CONSTANTS) and name not in _WITHOUT_EFFECT
    }
