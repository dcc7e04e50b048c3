"""Attention over packed rows, for any model that calls transformers' attention interface.

The model passes the `Packing` of a row on to every layer as the keyword `packing`, so that it is
there again when a checkpointed layer is computed a second time. On CUDA one FlexAttention block
mask serves all layers with the same window; elsewhere each prompt and each response is one call of
`scaled_dot_product_attention`, whose costs are the squares of sequences and not of the row.
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
from fastpref.data.packing import Packing, Row, lay_out

NAME = "fastpref_packed"


def register() -> str:
    """Make the implementation known to transformers; returns its name for `attn_implementation`.

    It has no mask function: the packing says all, and transformers makes no mask then.
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
    positions of the sequence, as if it were alone. Raises ValueError for a mask and for dropout.
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
        output = _by_sequence(packing, query, key, value, window=sliding_window, **options)
    return output.transpose(1, 2).contiguous(), None


def _by_sequence(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    sizes = packing.sizes.tolist()
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for _, *responses in packing.groups:
        q, *prompt = next(parts)
        outputs.append(causal_attention(q, prompt[0], prompt[1], **options))
        for _ in responses:
            q, *response = next(parts)
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
    """Attention (N, H, Q, D) of the last Q tokens of sequences of K tokens to all before them.

    Softmax of `softcap·tanh(s / softcap)`, s = scaling · qᵀk, over the last `window` positions.
    """
    ahead = key.shape[2] - query.shape[2]
    bounded = window is not None and window < key.shape[2]
    if softcap is None and not bounded and ahead < query.shape[2]:
        # Without a mask, whose size is the square, half of the work is left out: more than the
        # queries cost that are put before these and then dropped.
        whole = pad(query, (0, 0, ahead, 0))
        return scaled_dot_product_attention(
            whole, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )[:, :, ahead:]
    mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(ahead)
    if window is not None:
        mask = mask.triu(ahead - window + 1)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    copies = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide)
    return weights.to(value.dtype) @ value


def block_mask(packing: Packing, window: int | None, device: torch.device) -> Any:
    """What FlexAttention asks of a packed row, made once for all layers with the same window."""
    if (window, device) not in packing.masks:
        parts = (np.arange(len(packing.sizes)), packing.prompts)
        columns = (*(part.repeat(packing.sizes) for part in parts), packing.positions)
        own, prompt, position = (torch.from_numpy(column).to(device) for column in columns)

        def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = (own[k] == own[q]) | (own[k] == prompt[q])
            visible = visible & (position[k] <= position[q])
            return visible if window is None else visible & (position[q] - position[k] < window)

        size = len(position)
        packing.masks[window, device] = _maker(device.type)(sees, None, None, size, size, device)
    return packing.masks[window, device]


@cache
def _maker(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it does not write out the mask of all tokens by all tokens.
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


@torch.no_grad()
def packing_error(model: Any, groups: Sequence[TokenGroup]) -> float:
    """Largest relative error of a predicting hidden state, packed against each sequence alone.

    `max_t ‖h_t − h'_t‖ / ‖h'_t‖`, where h' is computed with the attention that the Hugging Face
    model has, and keeps; inf where it cannot take a packed row. What goes wrong only beyond some
    length, such as a window of which its layers say nothing, shows only in groups of that length.
    """
    trunk, own = model.base_model, model.config._attn_implementation
    members = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]

    def hidden(row: Row, **options: Any) -> Tensor:
        ids, positions, predictors = (tensor.to(model.device) for tensor in row[:3])
        output = trunk(input_ids=ids, position_ids=positions, use_cache=False, **options)
        return output.last_hidden_state[0, predictors]

    was_training = model.training
    model.eval()
    alone = torch.cat([hidden(lay_out(groups, [member], share=False)) for member in members])
    model.set_attn_implementation(register())
    try:
        if model.config._attn_implementation != NAME:
            return math.inf
        row = lay_out(groups, members)
        error = (hidden(row, packing=row.packing) - alone).norm(dim=-1) / alone.norm(dim=-1)
        return error.max().item()
    except (TypeError, ValueError):  # its forward has no room for the packing, or a mask of its own
        return math.inf
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
