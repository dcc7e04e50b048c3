"""Contestants and errors of the row `packed_attention`: a packed row of prompts and responses.

Queries, keys and values are views of `Inputs.hidden`, as of one stacked projection; the upstream
gradient is `Inputs.ref_hidden`. Results are (T, D). Methods that do not share prompts compute each
prompt once for each of its responses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastpref.attention import Segments, packed_attention, reference
from fastpref.bench.problems import Inputs, attention_heads, packed_segments

Function = Callable[[Inputs], Tensor]
Errors = dict[str, float]


def ours(impl: str) -> Function:
    """`fastpref.attention.packed_attention` by one implementation."""
    return lambda x: packed_attention(
        *operands(x), packed_segments(len(x.hidden)), impl=impl
    ).flatten(1)


def operands(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query (T, H, D), key and value (T, H', D)."""
    heads, key_heads, size = attention_heads(x.ref_hidden.shape[1])
    stacked = x.hidden.unflatten(1, (heads + 2 * key_heads, size))
    query, key, value = stacked.split((heads, key_heads, key_heads), dim=1)
    return query, key, value


def dense(x: Inputs) -> Tensor:
    """The definition: a (T, T) mask."""
    query, key, value = operands(x)
    segments = packed_segments(len(x.hidden))
    return reference.packed_attention(query, key, value, segments, query.shape[2] ** -0.5).flatten(
        1
    )


def sdpa_by_sequence(x: Inputs) -> Tensor:
    """One call of torch's fused attention for each prompt with one response."""
    parts, start = [], 0
    for prompt, *responses in packed_segments(len(x.hidden)).groups:
        shared, begin = slice(start, start + prompt), start + prompt
        for number, size in enumerate(responses or [0]):
            own = slice(begin, begin + size)
            query, key, value = (
                torch.cat([part[shared], part[own]]).transpose(0, 1)[None] for part in operands(x)
            )
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            rows = out[0].transpose(0, 1).flatten(1)
            parts.append(rows if number == 0 else rows[prompt:])
            begin += size
        start = begin
    return torch.cat(parts)


def flex(x: Inputs) -> Tensor:
    """FlexAttention with the block mask of the row."""
    query, key, value = (part.transpose(0, 1)[None] for part in operands(x))
    mask = _block_mask(len(x.hidden), x.hidden.device.type)
    out: Tensor = _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(tokens: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segments = packed_segments(tokens)
    owner = np.arange(len(segments.sizes)).repeat(segments.sizes)
    owners, prompts = (torch.from_numpy(ids).to(device) for ids in (owner, segments.prompts[owner]))

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_sequence = (owners[q] == owners[k]) | (prompts[q] == owners[k])
        return same_sequence & (k <= q)  # a prompt lies before its responses

    return torch.compile(create_block_mask)(sees, None, None, tokens, tokens, device)


def error_function(inputs: Inputs) -> Callable[[Tensor], Errors]:
    """Errors of a result and its gradient for the first group, which sees no other."""
    group = packed_segments(len(inputs.hidden)).groups[0]
    rows = slice(0, sum(group))
    hidden = inputs.hidden.detach()[rows].double().requires_grad_()
    upstream = inputs.ref_hidden[rows]
    query, key, value = operands(inputs._replace(hidden=hidden))
    exact = reference.packed_attention(
        query, key, value, Segments((group,)), query.shape[2] ** -0.5
    ).flatten(1)
    (grad,) = torch.autograd.grad(exact, hidden, upstream.double())
    exact = exact.detach()

    def errors_of(result: Tensor) -> Errors:
        errors = {"value": _relative(result[rows], exact)}
        if inputs.hidden.grad is not None:
            errors["grad_hidden"] = _relative(inputs.hidden.grad[rows], grad)
        return errors

    return errors_of


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
