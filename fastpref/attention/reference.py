"""Attention over a packed row in plain PyTorch with ordinary autograd: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.attention.segments import Segments


def packed_attention(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D), H a multiple of H'
    value: Tensor,  # (P, H', D)
    segments: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # (P, H, D)
    """Softmax attention with a (P, P) mask; see `fastpref.attention.packed_attention`.

    Scores and weights are fp32, or fp64 for fp64 inputs.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads_per_key = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads_per_key, dim=0) for x in (k, v))
    scores = scale * (q @ k.transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask(segments, window, query.device), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def mask(segments: Segments, window: int | None, device: torch.device) -> Tensor:
    """(P, P) bool, whether a query (row) sees a key (column)."""
    owner = torch.arange(len(segments.sizes)).repeat_interleave(torch.from_numpy(segments.sizes))
    prompt = torch.from_numpy(segments.prompts)[owner]
    position = torch.from_numpy(segments.positions)
    distance = position[:, None] - position[None, :]
    same_sequence = (owner[:, None] == owner[None, :]) | (prompt[:, None] == owner[None, :])
    visible = same_sequence & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return visible.to(device)
