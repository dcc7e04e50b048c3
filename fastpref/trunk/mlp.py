"""MLP of a decoder block, with its norms and its residual addition.

    y = x + N4(down(act(gate(N3(x))) * up(N3(x))))

N3 and N4 are left out where an architecture has none. The block computes N3(x) together with x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.trunk.gated import Activation, gated, gated_backward
from fastpref.trunk.layer import Gradients, Layer, NormModule
from fastpref.trunk.linear import Copies, LinearGroup, Tensors
from fastpref.trunk.norm import residual_rms_norm


class Saved(NamedTuple):
    """Tensors that the backward pass of the MLP needs."""

    hidden: Tensor  # (P, D)
    gate: Tensor  # (P, I)
    up: Tensor  # (P, I)
    output_input: Tensor | None  # of N4


class MlpLayer(Layer):
    """MLP of a block.

    gate_up: two layers gate and up, or one whose outputs are joined.
    norms: by name, "input" (N3) and "output" (N4).
    """

    def __init__(
        self,
        gate_up: LinearGroup,
        down: LinearGroup,
        norms: Mapping[str, NormModule],
        activation: Activation,
    ) -> None:
        super().__init__((gate_up, down), norms)
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def up_projection(
        self,
        hidden: Tensor,  # (P, D) x
        normalized: Tensor,  # (P, D) N3(x)
        tensors: Tensors,
        copies: Sequence[Copies | None],
    ) -> Saved:
        """Gate and up, and what else the backward pass needs of the layers before `down`."""
        outputs = self.gate_up.forward(normalized, tensors, copies[0])
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        return Saved(hidden, gate, up, None)

    def down_projection(
        self, saved: Saved, tensors: Tensors, copies: Sequence[Copies | None]
    ) -> tuple[Tensor, Saved]:
        """Output (P, D), and what the backward pass needs."""
        update = self._update(saved, tensors, copies)
        output_norm = self.norm("output", tensors)
        output, _ = residual_rms_norm(saved.hidden, update, output_norm, None)
        return output, saved if output_norm is None else saved._replace(output_input=update)

    def backward(
        self,
        grad: Tensor,  # (P, D)
        saved: Saved,
        gradients: Gradients,
        copies: Sequence[Copies | None],
        needs_hidden: bool,
    ) -> Tensor | None:
        """Gradient of the input, None if it is not needed; fills `gradients`."""
        hidden, gate, up, update = saved
        if "output" in self.norms and update is None:
            update = self._update(saved, gradients.tensors, copies)
        grad_update = self.norm_backward("output", grad, update, gradients)
        product = gated(gate, up, self.activation)
        grad_product = self.linear_backward(1, product, [grad_update], gradients, copies)
        assert grad_product is not None
        joined = list(gated_backward(grad_product, gate, up, self.activation))
        if len(self.gate_up.layers) == 1:
            joined = [torch.cat(joined, dim=1)]
        normalized = self.normalized("input", hidden, gradients.tensors)
        needs_input = needs_hidden or gradients.needs.get("norm.input", False)
        grad_input = self.linear_backward(0, normalized, joined, gradients, copies, needs_input)
        if grad_input is None:
            return None
        return self.norm_backward("input", grad_input, hidden, gradients, residual=grad)

    def _update(self, saved: Saved, tensors: Tensors, copies: Sequence[Copies | None]) -> Tensor:
        product = gated(saved.gate, saved.up, self.activation)
        return self.down.forward(product, tensors, copies[1])[0]
