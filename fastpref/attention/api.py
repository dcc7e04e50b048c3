"""`packed_attention`: checks its arguments, chooses an implementation, and is differentiable."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.attention.by_segment import Options
from fastpref.attention.segments import Segments
from fastpref.utils.first_order import refuse_second_order, refuse_transforms

_REMEDY = "use torch.nn.functional.scaled_dot_product_attention"


class Implementation(NamedTuple):
    """A module with `forward`, `backward` and, if optional, `unavailable_reason`."""

    name: str
    module: str
    devices: frozenset[str] | None = None  # device types on which "auto" takes it; None means all
    optional: bool = False


# In the order in which "auto" tries them.
TABLE = (
    Implementation("flash", "fastpref.attention.flash", frozenset({"cuda"}), optional=True),
    Implementation(
        "triton", "fastpref_kernels.packed_attention", frozenset({"cuda"}), optional=True
    ),
    Implementation("by_segment", "fastpref.attention.by_segment"),
)


def packed_attention(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D), H a multiple of H'
    value: Tensor,  # (P, H', D)
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (P, H, D)
    """Causal attention of each token to its segment and to the prompt of its group.

    out[i] = sum_j softmax_j(s_ij) value[j],  s_ij = softcap * tanh(scale * q_i·k_j / softcap)

    over the keys j that `Segments` lets token i see; of these, the last `window` positions of its
    sequence if there is a window. Differentiable once, by `torch.autograd` alone. Forward and
    backward keep O(P) numbers.

    scale: 1 / sqrt(D) if None.

    Raises ValueError for shapes, dtypes or devices that do not match, and for an `impl` that does
    not exist or cannot take such inputs.
    """
    _check(query, key, value, segments)
    refuse_transforms("packed_attention", query, key, value, remedy=_REMEDY)
    options = Options(query.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    backend = backend_for(query, options, impl)
    output: Tensor = _PackedAttention.apply(query, key, value, segments, options, backend)
    return output


def backend_for(query: Tensor, options: Options, impl: str = "auto") -> Any:
    """Module whose `forward` and `backward` run for such a query; raises ValueError."""
    return import_module(_choose(impl, query, options).module)


def implementation(
    query: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> str:
    """Name of the implementation that `packed_attention` runs for such a query."""
    return _choose(impl, query, Options(1.0, window, softcap)).name


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        options: Options,
        module: Any,
    ) -> Tensor:
        out, lse = module.forward(query, key, value, segments, options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.arguments = segments, options, module
        output: Tensor = out
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("packed_attention", _REMEDY)
        segments, options, module = ctx.arguments
        grads = module.backward(grad, *ctx.saved_tensors, segments, options)
        return (*grads, None, None, None)


def _choose(impl: str, query: Tensor, options: Options) -> Implementation:
    reason: Callable[..., str]
    device = query.device.type
    for row in TABLE:
        is_tried = impl == "auto" and (row.devices is None or device in row.devices)
        if is_tried or impl == row.name:
            if row.optional:
                reason = import_module(row.module).unavailable_reason
                problem = reason(query, options)
            else:
                problem = ""
            if not problem:
                return row
            if impl == row.name:
                raise ValueError(f"impl: {impl!r} {problem}, or use impl='auto'")
    names = ", ".join(repr(row.name) for row in TABLE)
    raise ValueError(f"impl: expected 'auto' or one of {names}, got {impl!r}")


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> None:
    if query.dim() != 3 or len(query) != segments.tokens:
        raise ValueError(
            f"query: expected shape ({segments.tokens}, H, D), a row for each token of the "
            f"segments, got {tuple(query.shape)}"
        )
    tokens, heads, size = query.shape
    if key.dim() != 3 or heads % key.shape[1] or (tokens, size) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key: expected shape ({tokens}, H', {size}), where H' divides the query's {heads} "
            f"heads, got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value: expected the key's shape {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name}: expected {query.dtype} on {query.device} like the query, got "
                f"{tensor.dtype} on {tensor.device}"
            )
