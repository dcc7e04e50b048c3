"""Attention over packed rows, for any model that calls transformers' attention interface.

The model passes the `Packing` of a row to every layer as the keyword argument `packing`, so it is
also available when activation checkpointing recomputes a layer. On CUDA, one FlexAttention block
mask serves all layers with the same window. On other devices each prompt and each response is one
call of `scaled_dot_product_attention`, so the cost grows with the square of the sequence lengths
and not of the row length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from fastpref.data.dataset import TokenGroup
from fastpref.data.packing import PackedRow, Packing, pack_groups

NAME = "fastpref_packed"


def register() -> str:
    """Register the attention with transformers; return its name for `attn_implementation`.

    No mask function is registered, so transformers builds no mask: the packing replaces it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (N, H, P, D)
    key: Tensor,  # (N, H', P, D), H a multiple of H'
    value: Tensor,  # (N, H', P, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, Any]:
    """Causal attention (N, P, H, D) of each token to its response and that response's prompt.

    Without `packing` every row is one sequence, padded on the right if at all. A window counts
    positions within the unpacked sequence. Raises ValueError for a mask and for dropout.
    """
    if attention_mask is not None or dropout:
        raise ValueError(
            f"{NAME} attention expected no mask and no dropout, got "
            f"{'a mask' if attention_mask is not None else f'dropout {dropout}'}; pad on the "
            "right, and set the model's attention dropout to 0"
        )
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    if packing is None:
        output = causal_attention(query, key, value, window=sliding_window, **options)
    elif query.device.type == "cuda":
        from transformers import AttentionInterface

        mask = block_mask(packing, sliding_window, query.device)
        return AttentionInterface()["flex_attention"](module, query, key, value, mask, **options)
    else:
        output = _by_segment(packing, query, key, value, window=sliding_window, **options)
    return output.transpose(1, 2).contiguous(), None


def _by_segment(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """Attention (1, H, P, D) of a packed row, one call per prompt and per response."""
    sizes = packing.sizes.tolist()
    segments = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for _, *responses in packing.groups:
        q, *prompt = next(segments)
        outputs.append(causal_attention(q, prompt[0], prompt[1], **options))
        for _ in responses:
            q, *response = next(segments)
            k, v = (torch.cat(pair, dim=2) for pair in zip(prompt, response, strict=True))
            outputs.append(causal_attention(q, k, v, **options))
    return torch.cat(outputs, dim=2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention (N, H, Q, D) of the last Q tokens of sequences of K tokens.

    Softmax of `softcap·tanh(s / softcap)`, s = scaling · qᵀk, over the last `window` positions.
    """
    offset = key.shape[2] - query.shape[2]
    has_window = window is not None and window < key.shape[2]
    if softcap is None and not has_window and offset < query.shape[2]:
        # Padding the queries allows is_causal, which needs no (Q, K) mask and skips half of the
        # work; this saves more than the padded queries cost.
        padded = pad(query, (0, 0, offset, 0))
        return scaled_dot_product_attention(
            padded, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )[:, :, offset:]
    mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(offset)
    if window is not None:
        mask = mask.triu(offset - window + 1)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_key, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=dtype)
    return weights.to(value.dtype) @ value


def block_mask(packing: Packing, window: int | None, device: torch.device) -> Any:
    """FlexAttention block mask of a packed row, built once for all layers with the same window."""
    if (window, device) not in packing.masks:
        columns = (
            np.arange(len(packing.sizes)).repeat(packing.sizes),
            packing.prompts.repeat(packing.sizes),
            packing.positions,
        )
        segment_ids, prompt_ids, positions = (
            torch.from_numpy(column).to(device) for column in columns
        )

        def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = (segment_ids[k] == segment_ids[q]) | (segment_ids[k] == prompt_ids[q])
            visible = visible & (positions[k] <= positions[q])
            return visible if window is None else visible & (positions[q] - positions[k] < window)

        size = len(positions)
        create = _create_block_mask(device.type)
        packing.masks[window, device] = create(mask_mod, None, None, size, size, device)
    return packing.masks[window, device]


@cache
def _create_block_mask(device_type: str) -> Any:
    """Return `create_block_mask`, compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask

    # The compiled function does not materialize the (P, P) mask.
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


@torch.no_grad()
def packing_error(model: Any, groups: Sequence[TokenGroup]) -> float:
    """Largest relative error of the hidden states that predict labels, packed against unpacked.

    `max_t ‖h_t − h'_t‖ / ‖h'_t‖`, where h' is computed from each sequence alone with the attention
    implementation of the Hugging Face model, which is restored; inf if the model cannot take a
    packed row. Errors that begin at some length, such as a window that the layers do not pass on,
    show only in groups of that length.
    """
    trunk, original = model.base_model, model.config._attn_implementation
    sequences = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]

    def hidden_states(row: PackedRow, **options: Any) -> Tensor:
        ids, positions, predictors = (tensor.to(model.device) for tensor in row[:3])
        output = trunk(input_ids=ids, position_ids=positions, use_cache=False, **options)
        return output.last_hidden_state[0, predictors]

    was_training = model.training
    model.eval()
    expected = torch.cat(
        [hidden_states(pack_groups(groups, [sequence], share=False)) for sequence in sequences]
    )
    model.set_attn_implementation(register())
    try:
        if model.config._attn_implementation != NAME:
            return math.inf
        row = pack_groups(groups, sequences)
        difference = hidden_states(row, packing=row.packing) - expected
        return (difference.norm(dim=-1) / expected.norm(dim=-1)).max().item()
    # The model's forward does not accept `packing`, or builds a mask.
    except (TypeError, ValueError):
        return math.inf
    finally:
        model.set_attn_implementation(original)
        model.train(was_training)
