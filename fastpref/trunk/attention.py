"""Attention of a decoder block, with its norms.

    y = x + N2(u),  u = o(attend(rope(Nq(q(N1(x)))), rope(Nk(k(N1(x)))), v(N1(x))))

N1, N2, Nq and Nk are left out where an architecture has none. The forward pass ends with u: the
block computes y together with the norm of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.attention import Segments, api
from fastpref.trunk.layer import Gradients, Layer, NormModule
from fastpref.trunk.linear import Copies, LinearGroup, Tensors
from fastpref.trunk.rotary import rotate, rotate_backward


@dataclass(frozen=True, eq=False)
class Positions:
    """Segments of the P tokens, and their rotary angles in the layers of one kind."""

    segments: Segments
    cos: Tensor  # (P, R)
    sin: Tensor  # (P, R)


class Heads(NamedTuple):
    """Constants of the attention."""

    queries: int  # H
    keys: int  # H'
    size: int  # D
    norm_each: bool  # Nq and Nk normalize each head, not whole rows
    scale: float
    window: int | None
    softcap: float | None


class Saved(NamedTuple):
    """Tensors that the backward pass of the attention needs."""

    hidden: Tensor  # (P, D)
    query: Tensor  # (P, H, D), rotated, as are the keys
    key: Tensor  # (P, H', D)
    value: Tensor  # (P, H', D)
    out: Tensor  # (P, H, D)
    lse: Tensor  # (P, H)
    query_input: Tensor | None  # of Nq
    key_input: Tensor | None  # of Nk
    output_input: Tensor | None  # of N2


class AttentionLayer(Layer):
    """Attention of a block.

    qkv: three layers q, k and v, or one whose outputs are joined.
    norms: by name, "input" (N1), "q", "k" and "output" (N2).
    """

    def __init__(
        self, qkv: LinearGroup, o: LinearGroup, norms: Mapping[str, NormModule], heads: Heads
    ) -> None:
        super().__init__((qkv, o), norms)
        self.qkv, self.o, self.heads = qkv, o, heads
        self._options = api.Options(heads.scale, heads.window, heads.softcap)

    def forward(
        self,
        hidden: Tensor,  # (P, D)
        positions: Positions,
        tensors: Tensors,
        copies: Sequence[Copies | None],
    ) -> tuple[Tensor, Saved]:
        """Update u (P, D), and what the backward pass needs."""
        outputs = self.qkv.forward(self.normalized("input", hidden, tensors), tensors, copies[0])
        query, key, value = self._split(outputs)
        query_input, key_input = (query, key) if "q" in self.norms else (None, None)
        query = self._head_norm("q", query, tensors)
        key = self._head_norm("k", key, tensors)
        rotate(query, key, positions.cos, positions.sin)
        backend = api.backend_for(query, self._options)
        out, lse = backend.forward(query, key, value, positions.segments, self._options)
        update = self.o.forward(out.flatten(1), tensors, copies[1])[0]
        output_input = update if "output" in self.norms else None
        saved = Saved(hidden, query, key, value, out, lse, query_input, key_input, output_input)
        return update, saved

    def backward(
        self,
        grad: Tensor,  # (P, D)
        saved: Saved,
        positions: Positions,
        gradients: Gradients,
        copies: Sequence[Copies | None],
        needs_hidden: bool,
    ) -> Tensor | None:
        """Gradient of the input, None if it is not needed; fills `gradients`."""
        grad_update = self.norm_backward("output", grad, saved.output_input, gradients)
        grad_out = self.linear_backward(1, saved.out.flatten(1), [grad_update], gradients, copies)
        assert grad_out is not None
        backend: Any = api.backend_for(saved.query, self._options)
        grad_query, grad_key, grad_value = backend.backward(
            grad_out.view_as(saved.out), *saved[1:6], positions.segments, self._options
        )
        rotate_backward(grad_query, grad_key, positions.cos, positions.sin)
        grad_query = self._head_norm_backward("q", grad_query, saved.query_input, gradients)
        grad_key = self._head_norm_backward("k", grad_key, saved.key_input, gradients)
        joined = [x.flatten(1) for x in (grad_query, grad_key, grad_value)]
        if len(self.qkv.layers) == 1:
            joined = [torch.cat(joined, dim=1)]
        normalized = self.normalized("input", saved.hidden, gradients.tensors)
        needs_input = needs_hidden or gradients.needs.get("norm.input", False)
        grad_input = self.linear_backward(0, normalized, joined, gradients, copies, needs_input)
        if grad_input is None:
            return None
        return self.norm_backward("input", grad_input, saved.hidden, gradients, residual=grad)

    def _split(self, outputs: list[Tensor]) -> list[Tensor]:
        """Queries (P, H, D), keys and values (P, H', D) from the outputs of the linear layers."""
        queries, keys, size = self.heads[:3]
        if len(outputs) == 1:
            outputs = list(outputs[0].split([queries * size, keys * size, keys * size], -1))
        return [x.unflatten(-1, (-1, size)) for x in outputs]

    def _head_norm(self, name: str, x: Tensor, tensors: Tensors) -> Tensor:
        """Queries or keys after their norm, of each head or of whole rows."""
        if self.heads.norm_each or name not in self.norms:
            return self.normalized(name, x, tensors)
        return self.normalized(name, x.flatten(1), tensors).view_as(x)

    def _head_norm_backward(
        self, name: str, grad: Tensor, x: Tensor | None, gradients: Gradients
    ) -> Tensor:
        if self.heads.norm_each or x is None:
            return self.norm_backward(name, grad, x, gradients)
        return self.norm_backward(name, grad.flatten(1), x.flatten(1), gradients).view_as(x)
