"""A decoder block with an explicit forward and backward pass: attention, then MLP.

Saved for the backward pass, per token: the inputs of attention and MLP, q, k and v after the rotary
embedding, the attention's output and log-sum-exp, gate and up; and the inputs of the norms of q and
k and of outputs. The backward pass recomputes outputs of norms, `act(gate) * up` and the adapters'
x A^T. A block that is recomputed saves its input alone; its backward pass runs the forward pass
again, except for the last product, which nothing needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpref.trunk import attention, mlp
from fastpref.trunk.attention import AttentionLayer, Positions
from fastpref.trunk.layer import Gradients
from fastpref.trunk.linear import LinearGroup, Tensors
from fastpref.trunk.mlp import MlpLayer
from fastpref.trunk.norm import residual_rms_norm
from fastpref.utils.first_order import refuse_second_order


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
        return *self.attention.groups, *self.mlp.groups

    def middle(
        self, hidden: Tensor, update: Tensor, first: Tensors, second: Tensors
    ) -> tuple[Tensor, Tensor]:
        """Input of the MLP, (P, D), and that input after the MLP's norm.

        update: of the attention. first, second: tensors of the attention and of the MLP.
        """
        output_norm = self.attention.norm("output", first)
        return residual_rms_norm(hidden, update, output_norm, self.mlp.norm("input", second))

    def __call__(self, hidden: Tensor, positions: Positions, recompute: bool = False) -> Tensor:
        """Output (P, D) of the block for its input (P, D).

        recompute: save the input alone for the backward pass.
        """
        tensors = self.attention.tensors(), self.mlp.tensors()
        names = tuple(map(tuple, tensors))
        values = [value for part in tensors for value in part.values()]
        output: Tensor = _Block.apply(hidden, self, positions, recompute, names, *values)
        return output


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        block: Block,
        positions: Positions,
        recompute: bool,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        *values: Tensor | None,
    ) -> Tensor:
        first, second = _by_name(names, values)
        copies = block.attention.copies(hidden.dtype), block.mlp.copies(hidden.dtype)
        update, of_attention = block.attention.forward(hidden, positions, first, copies[0])
        middle = block.middle(hidden, update, first, second)
        of_mlp = block.mlp.up_projection(*middle, second, copies[1])
        del update, middle  # the norm's output is not needed again
        output, of_mlp = block.mlp.down_projection(of_mlp, second, copies[1])
        saved = (hidden,) if recompute else (*of_attention, *of_mlp)
        ctx.save_for_backward(*saved, *values)
        ctx.arguments = block, positions, names, copies
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("the trunk of fastpref", "call the Hugging Face model")
        block, positions, names, copies = ctx.arguments
        count = sum(map(len, names))
        saved, values = ctx.saved_tensors[:-count], ctx.saved_tensors[-count:]
        needs_hidden, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[-count:]
        first, second = map(Gradients, _by_name(names, values), _by_name(names, needs))
        if len(saved) == 1:
            update, of_attention = block.attention.forward(
                saved[0], positions, first.tensors, copies[0]
            )
            middle = block.middle(saved[0], update, first.tensors, second.tensors)
            of_mlp = block.mlp.up_projection(*middle, second.tensors, copies[1])
            del update, middle
        else:
            size = len(attention.Saved._fields)
            of_attention, of_mlp = attention.Saved(*saved[:size]), mlp.Saved(*saved[size:])
        needs_middle = needs_hidden or any(first.needs.values())
        grad_hidden = block.mlp.backward(grad, of_mlp, second, copies[1], needs_middle)
        if grad_hidden is not None:
            grad_hidden = block.attention.backward(
                grad_hidden, of_attention, positions, first, copies[0], needs_hidden
            )
        gradients = [
            part.values.get(name) for part, row in zip((first, second), names, strict=True)
            for name in row
        ]  # fmt: skip
        return grad_hidden, None, None, None, None, *gradients


def _by_name(names: tuple[tuple[str, ...], tuple[str, ...]], values: Any) -> tuple[Any, Any]:
    """Values of the attention and of the MLP by the names of their tensors."""
    first, second = names
    return (
        dict(zip(first, values[: len(first)], strict=True)),
        dict(zip(second, values[len(first) :], strict=True)),
    )
