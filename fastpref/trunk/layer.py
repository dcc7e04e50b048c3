"""The parts that attention and MLP of a decoder block have in common: tensors by name, norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.trunk.linear import Copies, LinearGroup, Tensors
from fastpref.trunk.norm import Norm, WeightedNorm, rms_norm, rms_norm_backward


class NormModule(NamedTuple):
    """An RMSNorm of the Hugging Face model."""

    module: Any
    norm: Norm


@dataclass(frozen=True)
class Gradients:
    """Gradients of a layer's tensors by name, filled by its backward pass.

    needs: whether each tensor needs one.
    """

    tensors: Tensors
    needs: Mapping[str, bool]
    values: dict[str, Tensor] = field(default_factory=dict)


class Layer:
    """Groups of linear layers and norms, and how a pass finds their tensors.

    groups: in the order of `copies`. norms: by their role in the block.
    """

    def __init__(self, groups: Sequence[LinearGroup], norms: Mapping[str, NormModule]) -> None:
        self.groups = tuple(groups)
        self.norms = dict(norms)

    def tensors(self) -> dict[str, Tensor | None]:
        """Tensors that may need a gradient, by name, in a fixed order."""
        tensors: dict[str, Tensor | None] = {}
        for group in self.groups:
            tensors |= group.tensors()
        return tensors | {f"norm.{name}": norm.module.weight for name, norm in self.norms.items()}

    def copies(self, dtype: torch.dtype) -> list[Copies | None]:
        """Copies of the adapters that are active now, of each group."""
        return [group.copies(dtype) for group in self.groups]

    def norm(self, name: str, tensors: Tensors) -> WeightedNorm | None:
        """Weight and constants of a norm of the layer; None if there is none."""
        if name not in self.norms:
            return None
        weight = tensors[f"norm.{name}"]
        assert weight is not None
        return weight, self.norms[name].norm

    def normalized(self, name: str, x: Tensor, tensors: Tensors) -> Tensor:
        """x after a norm of the layer; x itself if there is none."""
        norm = self.norm(name, tensors)
        return x if norm is None else rms_norm(x, *norm)

    def norm_backward(
        self,
        name: str,
        grad: Tensor,
        x: Tensor | None,
        gradients: Gradients,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Gradient of a norm's input x, plus `residual`; without the norm it is that of x itself.

        Overwrites `grad` where there is no norm but a residual.
        """
        if name not in self.norms:
            return grad if residual is None else grad.add_(residual)
        key = f"norm.{name}"
        weight = gradients.tensors[key]
        assert weight is not None and x is not None
        needs_weight = gradients.needs[key]
        grad_x, grad_weight = rms_norm_backward(
            grad, x, weight, self.norms[name].norm, needs_weight, residual
        )
        if grad_weight is not None:
            gradients.values[key] = grad_weight
        return grad_x

    def linear_backward(
        self,
        group: int,
        x: Tensor,
        grads: Sequence[Tensor],
        gradients: Gradients,
        copies: Sequence[Copies | None],
        needs_x: bool = True,
    ) -> Tensor | None:
        """Gradient of the input of a group of linear layers; None if it is not needed."""
        grad_x, values = self.groups[group].backward(
            x, grads, gradients.tensors, copies[group], gradients.needs, needs_x
        )
        gradients.values.update(values)
        return grad_x
