"""Linear layers that read the same input, with LoRA adapters inside their products.

    forward     u = x A^T                          the A of all adapters stacked: (P, R)
                y_i = x W_i^T + b_i + u_i (s_i B_i)^T
    backward    g_i = grad_i (s_i B_i)             (P, R) for all
                grad_x = sum_i grad_i W_i + g A
                grad_A = g^T x      grad_B_i = grad_i^T (s_i u_i)
                grad_W_i = grad_i^T x      grad_b_i = sum over tokens of grad_i

Trained adapters are fp32; A and s B are copied to the compute dtype once per forward pass of the
model (`copy_adapters`), and their gradients are fp32. The backward pass recomputes u. With B = 0, y
is that of the base to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Tensors = Mapping[str, Tensor | None]


class UnknownLayer(ValueError):
    """A layer has a part that the explicit blocks do not compute."""


class Adapter(NamedTuple):
    """The active LoRA adapter of a layer."""

    name: str  # of the layer
    a: Tensor  # (r, D) master
    b: Tensor  # (O, r) master
    scale: float


class Copies(NamedTuple):
    """Adapters of a group, in the compute dtype."""

    stacked_a: Tensor  # (R, D)
    scaled_b: dict[str, Tensor]  # (O, r) by layer, times the scale
    columns: dict[str, slice]  # of each layer's part of u
    scales: dict[str, float]
    master_dtype: torch.dtype


class LinearGroup:
    """Linear layers of a block that read the same input.

    layers: modules by the names that their tensors have in the block; `torch.nn.Linear`,
        bitsandbytes' 4-bit layer, or peft's LoRA of one of them.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._copies: dict[Any, Copies] = {}

    def tensors(self) -> dict[str, Tensor | None]:
        """Tensors with gradients: `name.weight`, `.bias`, `.lora_a` and `.lora_b` of each layer."""
        tensors: dict[str, Tensor | None] = {}
        for name, layer in self.layers.items():
            base = base_layer(layer)
            # A 4-bit weight is a parameter of packed bytes, which no gradient reaches.
            quantized = hasattr(base.weight, "quant_state")
            tensors[f"{name}.weight"] = None if quantized else base.weight
            tensors[f"{name}.bias"] = base.bias
            adapter = active_adapter(name, layer)
            tensors[f"{name}.lora_a"] = None if adapter is None else adapter.a
            tensors[f"{name}.lora_b"] = None if adapter is None else adapter.b
        return tensors

    def adapters(self) -> list[Adapter]:
        """The adapters that are active now."""
        active = (active_adapter(name, layer) for name, layer in self.layers.items())
        return [adapter for adapter in active if adapter is not None]

    def copies(self, dtype: torch.dtype) -> Copies | None:
        """Buffers of the active adapters' copies, None without adapters.

        Each set of adapters has its own buffers: a pass of the reference between a policy's
        forward and backward pass changes none of them.
        """
        adapters = self.adapters()
        if not adapters:
            return None
        parts = ((id(adapter.a), len(adapter.a), adapter.scale) for adapter in adapters)
        key = (dtype, adapters[0].a.device, *parts)
        if key not in self._copies:
            columns, end = {}, 0
            for adapter in adapters:
                columns[adapter.name] = slice(end, end := end + len(adapter.a))
            first = adapters[0].a
            self._copies[key] = Copies(
                first.new_empty(end, first.shape[1], dtype=dtype),
                {adapter.name: torch.empty_like(adapter.b, dtype=dtype) for adapter in adapters},
                columns,
                {adapter.name: adapter.scale for adapter in adapters},
                first.dtype,
            )
        return self._copies[key]

    def forward(self, x: Tensor, tensors: Tensors, copies: Copies | None) -> list[Tensor]:
        """Outputs (P, O) of each layer for the input (P, D)."""
        update = None if copies is None else x @ copies.stacked_a.T
        outputs = []
        for name in self.layers:
            bias = tensors[f"{name}.bias"]
            bias = None if bias is None else bias.to(x.dtype)
            y = linear(x, self._weight(name, tensors, x.dtype), bias)
            if copies is not None and update is not None and name in copies.columns:
                y.addmm_(update[:, copies.columns[name]], copies.scaled_b[name].T)
            outputs.append(y)
        return outputs

    def backward(
        self,
        x: Tensor,  # (P, D)
        grads: Sequence[Tensor],  # (P, O) of each layer
        tensors: Tensors,
        copies: Copies | None,
        needs: Mapping[str, bool],
        needs_x: bool = True,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Gradient of x, and of the tensors that need one, by their names."""
        result: dict[str, Tensor] = {}
        grad_x = None
        for name, grad in zip(self.layers, grads, strict=True):
            if needs_x:
                weight = self._weight(name, tensors, x.dtype)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            if needs[f"{name}.weight"]:
                result[f"{name}.weight"] = grad.T @ x
            if needs[f"{name}.bias"]:
                result[f"{name}.bias"] = grad.sum(0)
        if copies is None:
            return grad_x, result
        by_name = dict(zip(self.layers, grads, strict=True))
        grad_update = x.new_empty(len(x), len(copies.stacked_a))
        for name, columns in copies.columns.items():
            torch.mm(by_name[name], copies.scaled_b[name], out=grad_update[:, columns])
        if grad_x is not None:
            grad_x.addmm_(grad_update, copies.stacked_a)
        if any(needs[f"{name}.lora_a"] for name in copies.columns):
            grad_a = _product(grad_update.T, x, copies.master_dtype)
            for name, columns in copies.columns.items():
                result[f"{name}.lora_a"] = grad_a[columns]
        if any(needs[f"{name}.lora_b"] for name in copies.columns):
            update = _scaled_update(x, copies)
            for name, columns in copies.columns.items():
                result[f"{name}.lora_b"] = _product(
                    by_name[name].T, update[:, columns], copies.master_dtype
                )
        return grad_x, result

    def _weight(self, name: str, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        weight = tensors[f"{name}.weight"]
        if weight is not None:
            return weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        packed: Any = base_layer(self.layers[name]).weight
        dense: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        return dense.to(dtype)


def base_layer(layer: Any) -> Any:
    """The layer without the wrapper of peft."""
    return getattr(layer, "base_layer", layer)


def active_adapter(name: str, layer: Any) -> Adapter | None:
    """The LoRA adapter that is active in a layer, if any; raises UnknownLayer for several."""
    if not hasattr(layer, "lora_A"):
        return None
    if layer.merged:
        if layer.disable_adapters:
            raise UnknownLayer(f"{name} has a merged adapter, which cannot be left out")
        return None  # the weight has it
    if layer.disable_adapters:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise UnknownLayer(f"{name} has {len(active)} active adapters, {' and '.join(active)}")
    a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    return Adapter(name, a, b, float(layer.scaling[active[0]]))


def _scaled_update(x: Tensor, copies: Copies) -> Tensor:
    """Updates u (P, R), each times its adapter's scale; one launch if the scales are equal."""
    scales = set(copies.scales.values())
    if len(scales) == 1:
        none = x.new_empty(1)
        return torch.addmm(none, x, copies.stacked_a.T, beta=0, alpha=scales.pop())
    update = x @ copies.stacked_a.T
    for name, columns in copies.columns.items():
        update[:, columns] *= copies.scales[name]
    return update


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b; if fp32 is wanted of half precision, without a rounding to it."""
    if dtype != torch.float32 or a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


@torch.no_grad()
def copy_adapters(groups: Sequence[LinearGroup], dtype: torch.dtype) -> None:
    """Copy the active adapters of all groups to the compute dtype, in few launches."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    scaled: list[Tensor] = []
    masters: list[Tensor] = []
    scales: list[float] = []
    for group in groups:
        copies = group.copies(dtype)
        if copies is None:
            continue
        for adapter in group.adapters():
            targets.append(copies.stacked_a[copies.columns[adapter.name]])
            sources.append(adapter.a)
            scaled.append(copies.scaled_b[adapter.name])
            masters.append(adapter.b)
            scales.append(adapter.scale)
    if targets:
        torch._foreach_copy_(targets, sources)
        torch._foreach_copy_(scaled, torch._foreach_mul(masters, scales))
