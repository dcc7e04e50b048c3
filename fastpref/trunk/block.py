"""A decoder block as two functions, attention and MLP, each with its residual addition.

    attention   y = x + N2(o(attend(rope(Nq(q(N1(x)))), rope(Nk(k(N1(x)))), v(N1(x)))))
    MLP         y = x + N4(down(act(gate(N3(x))) * up(N3(x))))

The norms N1 to N4, Nq and Nk are left out where an architecture has none. Saved for the backward
pass, per token: x, q, k and v after the rotary embedding, the attention's output and log-sum-exp,
gate and up; and the inputs of Nq, Nk, N2 and N4. The backward pass recomputes outputs of norms,
`act(gate) * up` and the adapters' x A^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.attention import Segments
from fastpref.attention import api as attention
from fastpref.trunk.gated import Activation, gated, gated_backward
from fastpref.trunk.linear import LinearGroup, Tensors
from fastpref.trunk.norm import Norm, rms_norm, rms_norm_backward
from fastpref.trunk.rotary import rotate, rotate_backward


@dataclass(frozen=True, eq=False)
class Positions:
    """Segments of the P tokens, and their rotary angles in the layers of one kind."""

    segments: Segments
    cos: Tensor  # (P, R)
    sin: Tensor  # (P, R)


class NormModule:
    """An RMSNorm of the Hugging Face model."""

    def __init__(self, module: Any, norm: Norm) -> None:
        self.module, self.norm = module, norm

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return rms_norm(x, weight, self.norm)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        needs_weight: bool,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert weight is not None
        return rms_norm_backward(grad, x, weight, self.norm, needs_weight, residual)


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """Modules and constants of a block's attention.

    qkv: three layers q, k and v, or one whose outputs are joined.
    norms: by name, "input" (N1), "q", "k" (of whole rows or of each head) and "output" (N2).
    """

    qkv: LinearGroup
    o: LinearGroup
    norms: Mapping[str, NormModule]
    heads: int
    key_heads: int
    head_size: int
    norm_heads: bool  # Nq and Nk normalize each head, not whole rows
    scale: float
    window: int | None
    softcap: float | None

    def tensors(self) -> dict[str, Tensor | None]:
        return _tensors((self.qkv, self.o), self.norms)


@dataclass(frozen=True, eq=False)
class MlpLayer:
    """Modules and constants of a block's MLP.

    gate_up: two layers gate and up, or one whose outputs are joined.
    norms: by name, "input" (N3) and "output" (N4).
    """

    gate_up: LinearGroup
    down: LinearGroup
    norms: Mapping[str, NormModule]
    activation: Activation

    def tensors(self) -> dict[str, Tensor | None]:
        return _tensors((self.gate_up, self.down), self.norms)


class Block:
    """A decoder block on the parameters of a Hugging Face layer."""

    def __init__(
        self, module: nn.Module, attention: AttentionLayer, mlp: MlpLayer, kind: str | None
    ) -> None:
        self.module = module
        self.attention = attention
        self.mlp = mlp
        self.kind = kind  # type of the layer, where rotary angles depend on it

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down

    def __call__(self, hidden: Tensor, positions: Positions) -> Tensor:
        """Output (P, D) of the block for its input (P, D)."""
        hidden = _apply(_Attention, hidden, self.attention, positions)
        return _apply(_Mlp, hidden, self.mlp)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: AttentionLayer,
        positions: Positions,
        names: tuple[str, ...],
        *values: Tensor | None,
    ) -> Tensor:
        tensors: Tensors = dict(zip(names, values, strict=True))
        norms = layer.norms
        copies = layer.qkv.copies(hidden.dtype), layer.o.copies(hidden.dtype)
        normalized = _normalized(layer, "input", hidden, tensors)
        outputs = layer.qkv.forward(normalized, tensors, copies[0])
        query, key, value = _split_heads(layer, outputs)
        unnormalized = []
        if "q" in norms:
            unnormalized = [query, key]
            query = _head_norm(layer, "q", query, tensors)
            key = _head_norm(layer, "k", key, tensors)
        rotate(query, key, positions.cos, positions.sin)
        implementation, options = _attend(layer, query)
        out, lse = implementation.forward(query, key, value, positions.segments, options)
        update = layer.o.forward(out.flatten(1), tensors, copies[1])[0]
        saved = [hidden, query, key, value, out, lse, *unnormalized]
        if "output" in norms:
            saved.append(update)
            update = _normalized(layer, "output", update, tensors)
        _save(ctx, saved, values)
        ctx.arguments = layer, positions, names, copies
        return hidden + update if "output" in norms else update.add_(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layer, positions, names, copies = ctx.arguments
        saved, tensors, needs = _saved(ctx, names, 4)
        hidden, query, key, value, out, lse, *rest = saved
        grads: dict[str, Tensor | None] = {}
        grad_update = grad
        if "output" in layer.norms:
            grad_update = _norm_backward(layer, "output", grad, rest.pop(), tensors, needs, grads)
        grad_out, linear_grads = layer.o.backward(
            out.flatten(1), [grad_update], tensors, copies[1], needs
        )
        grads |= linear_grads
        assert grad_out is not None
        implementation, options = _attend(layer, query)
        grad_query, grad_key, grad_value = implementation.backward(
            grad_out.view_as(out), query, key, value, out, lse, positions.segments, options
        )
        rotate_backward(grad_query, grad_key, positions.cos, positions.sin)
        if "q" in layer.norms:
            grad_query = _head_norm_backward(layer, "q", grad_query, rest[0], tensors, needs, grads)
            grad_key = _head_norm_backward(layer, "k", grad_key, rest[1], tensors, needs, grads)
        joined = [x.flatten(1) for x in (grad_query, grad_key, grad_value)]
        if len(layer.qkv.layers) == 1:
            joined = [torch.cat(joined, dim=1)]
        normalized = _normalized(layer, "input", hidden, tensors)
        needs_input = ctx.needs_input_grad[0] or needs.get("norm.input", False)
        grad_normalized, linear_grads = layer.qkv.backward(
            normalized, joined, tensors, copies[0], needs, needs_input
        )
        grads |= linear_grads
        grad_hidden = _input_backward(layer, grad_normalized, grad, hidden, tensors, needs, grads)
        return grad_hidden, None, None, None, *(grads.get(name) for name in names)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: MlpLayer,
        names: tuple[str, ...],
        *values: Tensor | None,
    ) -> Tensor:
        tensors: Tensors = dict(zip(names, values, strict=True))
        copies = layer.gate_up.copies(hidden.dtype), layer.down.copies(hidden.dtype)
        normalized = _normalized(layer, "input", hidden, tensors)
        outputs = layer.gate_up.forward(normalized, tensors, copies[0])
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        update = layer.down.forward(gated(gate, up, layer.activation), tensors, copies[1])[0]
        saved = [hidden, gate, up]
        if "output" in layer.norms:
            saved.append(update)
            update = _normalized(layer, "output", update, tensors)
        _save(ctx, saved, values)
        ctx.arguments = layer, names, copies
        return hidden + update if "output" in layer.norms else update.add_(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layer, names, copies = ctx.arguments
        (hidden, gate, up, *rest), tensors, needs = _saved(ctx, names, 3)
        grads: dict[str, Tensor | None] = {}
        grad_update = grad
        if "output" in layer.norms:
            grad_update = _norm_backward(layer, "output", grad, rest.pop(), tensors, needs, grads)
        grad_product, linear_grads = layer.down.backward(
            gated(gate, up, layer.activation), [grad_update], tensors, copies[1], needs
        )
        grads |= linear_grads
        assert grad_product is not None
        joined = list(gated_backward(grad_product, gate, up, layer.activation))
        if len(layer.gate_up.layers) == 1:
            joined = [torch.cat(joined, dim=1)]
        normalized = _normalized(layer, "input", hidden, tensors)
        needs_input = ctx.needs_input_grad[0] or needs.get("norm.input", False)
        grad_normalized, linear_grads = layer.gate_up.backward(
            normalized, joined, tensors, copies[0], needs, needs_input
        )
        grads |= linear_grads
        grad_hidden = _input_backward(layer, grad_normalized, grad, hidden, tensors, needs, grads)
        return grad_hidden, None, None, *(grads.get(name) for name in names)


def _tensors(
    groups: tuple[LinearGroup, ...], norms: Mapping[str, NormModule]
) -> dict[str, Tensor | None]:
    """Tensors of a layer by name, in the order in which its function takes them."""
    tensors: dict[str, Tensor | None] = {}
    for group in groups:
        tensors |= group.tensors()
    return tensors | {f"norm.{name}": norm.module.weight for name, norm in norms.items()}


def _apply(function: Any, hidden: Tensor, layer: Any, *arguments: Any) -> Tensor:
    tensors = layer.tensors()
    output: Tensor = function.apply(hidden, layer, *arguments, tuple(tensors), *tensors.values())
    return output


def _save(ctx: Any, saved: list[Tensor], values: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*saved, *values)
    ctx.activations = len(saved)


def _saved(
    ctx: Any, names: tuple[str, ...], first: int
) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None], dict[str, bool]]:
    """Activations, tensors by name, and whether each needs a gradient.

    first: number of arguments of the function before the tensors.
    """
    saved = ctx.saved_tensors
    tensors = dict(zip(names, saved[ctx.activations :], strict=True))
    needs = dict(zip(names, ctx.needs_input_grad[first:], strict=True))
    return saved[: ctx.activations], tensors, needs


def _attend(layer: AttentionLayer, query: Tensor) -> tuple[Any, attention.Options]:
    """Implementation of the attention, and its options."""
    options = attention.Options(layer.scale, layer.window, layer.softcap)
    return attention.backend_for(query, options), options


def _split_heads(layer: AttentionLayer, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (P, H, D), keys and values (P, H', D) from the outputs of the linear layers."""
    size, heads, key_heads = layer.head_size, layer.heads, layer.key_heads
    if len(outputs) == 1:
        outputs = list(outputs[0].split([heads * size, key_heads * size, key_heads * size], -1))
    query, key, value = (x.unflatten(-1, (-1, size)) for x in outputs)
    return query, key, value


def _normalized(layer: AttentionLayer | MlpLayer, name: str, x: Tensor, tensors: Tensors) -> Tensor:
    """x after a norm of the layer; x itself if there is none."""
    norm = layer.norms.get(name)
    return x if norm is None else norm.forward(x, tensors[f"norm.{name}"])


def _norm_backward(
    layer: AttentionLayer | MlpLayer,
    name: str,
    grad: Tensor,
    x: Tensor,
    tensors: Tensors,
    needs: Mapping[str, bool],
    grads: dict[str, Tensor | None],
    residual: Tensor | None = None,
) -> Tensor:
    """Gradient of a norm's input, plus `residual`; adds that of its weight to `grads`."""
    key = f"norm.{name}"
    grad_x, grads[key] = layer.norms[name].backward(grad, x, tensors[key], needs[key], residual)
    return grad_x


def _input_backward(
    layer: AttentionLayer | MlpLayer,
    grad_normalized: Tensor | None,
    grad_residual: Tensor,
    hidden: Tensor,
    tensors: Tensors,
    needs: Mapping[str, bool],
    grads: dict[str, Tensor | None],
) -> Tensor | None:
    """Gradient of a layer's input, the residual's included."""
    if grad_normalized is None:
        return None
    if "input" not in layer.norms:
        return grad_normalized.add_(grad_residual)
    return _norm_backward(
        layer, "input", grad_normalized, hidden, tensors, needs, grads, grad_residual
    )


def _head_norm(layer: AttentionLayer, name: str, x: Tensor, tensors: Tensors) -> Tensor:
    """Queries or keys after their norm, of each head or of whole rows."""
    if layer.norm_heads:
        return _normalized(layer, name, x, tensors)
    return _normalized(layer, name, x.flatten(1), tensors).view_as(x)


def _head_norm_backward(
    layer: AttentionLayer,
    name: str,
    grad: Tensor,
    x: Tensor,
    tensors: Tensors,
    needs: Mapping[str, bool],
    grads: dict[str, Tensor | None],
) -> Tensor:
    if layer.norm_heads:
        return _norm_backward(layer, name, grad, x, tensors, needs, grads)
    flat = _norm_backward(layer, name, grad.flatten(1), x.flatten(1), tensors, needs, grads)
    return flat.view_as(x)
