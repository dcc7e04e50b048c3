"""A computation in the place of a model's head, while the forward pass of a wrapper runs.

DistributedDataParallel, FSDP2 and DeepSpeed gather parameters and reduce gradients around the
forward pass of the wrapped model. A loss that is computed from the head's weight outside of it
passes them by. `through_head` computes it where the model calls its head, on the weight that the
head has there, and lets the backward pass enter by the output of the wrapper:

    loss = exit(logits)  <-  wrapper, casts, scales, caps  <-  entrance(loss in the head)

The logits between the two are zeros at one position. Their gradient is zero, too: it only puts the
hooks of the wrapper in order, and the gradient of the loss goes from exit to entrance unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Hidden states (S, L, D), weight (V, D) and bias (V,) of the head to a tensor of any shape.
Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which the head, called as ever, runs `forward`; its hooks stay."""
    # Compiled wrappers break their graph here, and do not compile the computation.
    uncompiled = torch.compiler.disable(forward)
    vars(head)["forward"] = uncompiled
    try:
        yield
    finally:
        vars(head).pop("forward", None)


def through_head(
    model: Callable[..., Any], head: nn.Linear, compute: Compute, inputs: Mapping[str, Any]
) -> tuple[Tensor, Any]:
    """Return what `compute` makes in the place of the head, and the model's own output.

    model: the wrapper, which is called with `inputs`.
    head: linear layer that the model calls once for its logits.

    Gradients of the result reach the parameters through the output of the wrapper. The logits of
    the output are zeros at one position. Raises ValueError if the model does not call the head
    once, or if its logits do not come from the head alone.
    """
    results: list[_Entered] = []

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        check_plain(weight)
        entered = _Entered(compute(hidden, weight, bias), _Gradient())
        results.append(entered)
        zeros = hidden.new_zeros(*hidden.shape[:-2], 1, len(weight))
        entered.shape = zeros.shape[:-1]
        if not entered.result.requires_grad:
            return zeros
        logits: Tensor = _Entrance.apply(entered.result, entered.gradient, zeros)
        entered.node = logits.grad_fn
        return logits

    with replaced_forward(head, forward):
        output = model(**inputs)
    if len(results) != 1:
        raise ValueError(
            f"model: {type(model).__name__} calls the head {len(results)} times in a forward pass, "
            "expected once; pass the model that the loss was made for, or a wrapper of it"
        )
    (entered,) = results
    logits = logits_of(output)
    check_alone(model, logits, entered.shape)
    lost = torch.is_grad_enabled() and not entered.enabled
    if not lost and entered.node is None and not logits.requires_grad:
        return entered.result.detach(), output
    if lost or not _depends_on(logits, entered.node):
        raise ValueError(
            f"model: the logits of {type(model).__name__} do not depend on its head in the graph "
            "of gradients; checkpoint its layers, not the call of the whole model"
        )
    result: Tensor = _Exit.apply(logits, entered.result.detach(), entered.gradient)
    return result, output


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a causal language model, or of a wrapper of one."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if logits is None and isinstance(output, list | tuple) and len(output) > 0:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model: expected an output with logits, got {type(output).__name__}; "
            "pass a causal language model"
        )
    return logits


def check_plain(weight: Tensor) -> None:
    """Raise ValueError for a sharded, quantized or empty weight of a head."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"model: the weight of the head is no plain tensor (V, D) in the forward pass, but a "
            f"{type(weight).__name__} {tuple(weight.shape)}; leave the head out of tensor "
            "parallelism and quantization, and call the wrapper that gathers it"
        )


def check_alone(model: Any, logits: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if something is added to logits (*shape, V) of the head's one position."""
    if logits.shape[:-1] != shape:
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not those of its head alone; "
            "adapters and layers alongside the head are not supported"
        )


class _Gradient:
    """Gradient of the result, on its way from the exit of the model to the entrance."""

    value: Tensor | None = None


@dataclass
class _Entered:
    result: Tensor
    gradient: _Gradient
    enabled: bool = field(default_factory=torch.is_grad_enabled)  # where the head is called
    node: Any = None  # of the entrance in the graph; None without a gradient
    shape: tuple[int, ...] = ()  # of the logits, without their vocabulary


class _Entrance(torch.autograd.Function):
    """Zeros in place of logits, which the result of the head's computation depends on."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, gradient: _Gradient, zeros: Tensor) -> Tensor:
        ctx.gradient = gradient
        return zeros.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        value, ctx.gradient.value = ctx.gradient.value, None
        if value is None:
            raise RuntimeError("the logits of this output are zeros; use the loss in their place")
        return value, None, None


class _Exit(torch.autograd.Function):
    """The result of the head's computation, as if it were computed from the model's output."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, result: Tensor, gradient: _Gradient) -> Tensor:
        ctx.gradient = gradient
        ctx.like = logits.shape, {"dtype": logits.dtype, "device": logits.device}
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor) -> tuple[Tensor | None, ...]:
        ctx.gradient.value = grad_result
        shape, options = ctx.like
        return torch.zeros(shape, **options), None, None


def _depends_on(logits: Tensor, entrance: Any) -> bool:
    """Whether the entrance is in the graph of the logits; it stands a few nodes before them."""
    return entrance is not None and any(node is entrance for node in _nodes(logits))


def leaves_of(logits: Tensor) -> list[Tensor]:
    """Leaves of the graph of logits, the tensor itself if it is one."""
    if logits.grad_fn is None:
        return [logits] if logits.requires_grad else []
    return [node.variable for node in _nodes(logits) if hasattr(node, "variable")]


def _nodes(logits: Tensor) -> Iterator[Any]:
    """Nodes of the graph, nearest first."""
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        following = []
        for node in nodes:
            if node is not None and node not in seen:
                yield node
                seen.add(node)
                following += [each for each, _ in node.next_functions]
        nodes = following
