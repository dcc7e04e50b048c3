"""Attention over a packed row, one call per prompt and per response, in plain PyTorch.

A response's queries meet two blocks of keys, its prompt and itself. Each block has an output and a
log-sum-exp, and these merge by

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The backward pass of a block needs only the merged values: the weights are exp(score - lse). No key
of a prompt is copied. Under a window shorter than the sequence, the two blocks are joined instead
and masked, so that no query is left without a key. Memory: on a CPU, O(P) without a softcap; with
one, and on other devices, the scores of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.attention.segments import Segments


class Options(NamedTuple):
    """Options of the scores softcap * tanh(scale * q·k / softcap), within a window of positions."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Block(NamedTuple):
    """Queries that meet ranges of keys of the row; the last key is that of the last query.

    keys: joined, in order.
    causal: whether a query sees only keys up to its own; otherwise it sees all.
    """

    queries: slice
    keys: tuple[slice, ...]
    causal: bool

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """(Q, K) bool, whether a query sees a key."""
        queries = self.queries.stop - self.queries.start
        keys = sum(part.stop - part.start for part in self.keys)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return mask if window is None else mask.triu(keys - queries - window + 1)


def forward(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    segments: Segments,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Outputs (P, H, D) and log-sum-exps (P, H) of the scores, fp32 or fp64."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for blocks in _blocks(segments, options.window):
        rows = blocks[0].queries
        out[rows], lse[rows] = _attend(blocks[0], query, key, value, options)
        for block in blocks[1:]:
            block_out, block_lse = _attend(block, query, key, value, options)
            total = torch.logaddexp(lse[rows], block_lse)
            first, second = ((part - total).exp()[..., None] for part in (lse[rows], block_lse))
            out[rows] = (first * out[rows] + second * block_out).to(out.dtype)
            lse[rows] = total
    return out, lse


def backward(
    grad: Tensor,  # (P, H, D)
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    out: Tensor,  # (P, H, D)
    lse: Tensor,  # (P, H)
    segments: Segments,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    ]
    for blocks in _blocks(segments, options.window):
        for block in blocks:
            parts = _attend_backward(block, grad, query, key, value, out, lse, options)
            grads[0][block.queries] += parts[0]
            for total, part in zip(grads[1:], parts[1:], strict=True):
                sizes = [keys.stop - keys.start for keys in block.keys]
                for keys, values in zip(block.keys, part.split(sizes), strict=True):
                    total[keys] += values
    return grads[0], grads[1], grads[2]


def _blocks(segments: Segments, window: int | None) -> Iterator[tuple[Block, ...]]:
    """Blocks of each segment, in the order of the row."""
    for start, size, prompt in zip(
        segments.starts.tolist(), segments.sizes.tolist(), segments.prompts.tolist(), strict=True
    ):
        own, prompt_start = slice(start, start + size), int(segments.starts[prompt])
        prompt_size = int(segments.sizes[prompt])
        if start == prompt_start:
            yield (Block(own, (own,), causal=True),)
        elif window is not None and window < prompt_size + size:
            seen = slice(
                prompt_start + max(0, prompt_size - window + 1), prompt_start + prompt_size
            )
            yield (Block(own, (seen, own) if seen.start < seen.stop else (own,), causal=True),)
        else:
            shared = slice(prompt_start, prompt_start + prompt_size)
            yield Block(own, (shared,), causal=False), Block(own, (own,), causal=True)


def _attend(
    block: Block, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Output (Q, H, D) and log-sum-exp (Q, H) of a block."""
    q, k, v = _inputs(block, query, key, value)
    if _has_kernel(query, options):
        is_causal, mask = _kernel_mask(block, k, options)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, is_causal,
            attn_mask=mask, scale=options.scale,
        )  # fmt: skip
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    scores, _ = _scores(block, q, k, options)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ _grouped(v, k)
    return _ungrouped(out, q).to(q.dtype), _ungrouped(lse[..., None], q)[..., 0]


def _attend_backward(
    block: Block,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block's query (Q, H, D), key and value (K, H', D)."""
    q, k, v = _inputs(block, query, key, value)
    grad, out, lse = (x[block.queries] for x in (grad, out, lse))
    if _has_kernel(query, options):
        is_causal, mask = _kernel_mask(block, k, options)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad), _heads_first(q), _heads_first(k), _heads_first(v),
            _heads_first(out), lse.transpose(0, 1)[None], 0.0, is_causal,
            attn_mask=mask, scale=options.scale,
        )  # fmt: skip
        return tuple(x[0].transpose(0, 1) for x in grads)
    scores, slope = _scores(block, q, k, options)
    weights = (scores - _grouped(lse[..., None], k)).exp()
    upstream = _grouped(grad, k)
    grad_value = weights.transpose(1, 2) @ upstream
    delta = (upstream * _grouped(out, k)).sum(-1, keepdim=True)
    grad_scores = weights * (upstream @ _grouped(v, k).transpose(1, 2) - delta)
    grad_scores = grad_scores * (options.scale if slope is None else options.scale * slope)
    grad_query = _ungrouped(grad_scores @ _grouped(k, k), q)
    grad_key = grad_scores.transpose(1, 2) @ _grouped(q, k)
    return (
        grad_query.to(q.dtype),
        grad_key.transpose(0, 1).to(k.dtype),
        grad_value.transpose(0, 1).to(v.dtype),
    )


def _inputs(block: Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries (Q, H, D), keys and values (K, H', D) of a block; copies only if keys are joined."""
    parts = ([x[part] for part in block.keys] for x in (key, value))
    k, v = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
    return query[block.queries], k, v


def _has_kernel(query: Tensor, options: Options) -> bool:
    """Whether torch's fused attention for the CPU computes the scores."""
    return query.device.type == "cpu" and options.softcap is None


def _kernel_mask(block: Block, key: Tensor, options: Options) -> tuple[bool, Tensor | None]:
    """Arguments `is_causal` and `attn_mask` of torch's fused attention for the CPU."""
    window = options.window
    has_window = window is not None and window < len(key)
    if not block.causal or (len(block.keys) == 1 and not has_window):
        return block.causal, None
    seen = block.mask(window, key.device)
    return False, key.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _scores(block: Block, q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Masked scores (H', G Q, K) and the slope of their softcap."""
    scores, slope = options.scale * (_grouped(q, k) @ _grouped(k, k).transpose(1, 2)), None
    if options.softcap is not None:
        ratio = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * ratio, 1 - ratio.square()
    if block.causal:
        seen = block.mask(options.window, q.device)
        scores = scores.masked_fill(~seen.repeat(q.shape[1] // k.shape[1], 1), -torch.inf)
    return scores, slope


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """Heads that share a key: (L, H, D) -> (H', G L, D), fp32 or fp64."""
    length, heads, size = x.shape
    groups = x.view(length, k.shape[1], heads // k.shape[1], size).permute(1, 2, 0, 3)
    wide = groups.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(k.shape[1], -1, size)


def _ungrouped(x: Tensor, q: Tensor) -> Tensor:
    """Inverse of `_grouped`: (H', G Q, D) -> (Q, H, D)."""
    length, heads = q.shape[:2]
    return x.view(heads, length, x.shape[-1]).transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    """(L, H, D) -> (1, H, L, D)."""
    return x.transpose(0, 1)[None]
