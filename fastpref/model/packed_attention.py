"""Attention over packed rows, for any model that calls transformers' attention interface.

The model passes the `Segments` of a row to every layer as the keyword argument `segments`, so they
are also available when activation checkpointing recomputes a layer. `fastpref.attention` computes
it; on CUDA, where neither its kernel nor flash-attn can run, FlexAttention with one block mask for
all layers with the same window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref import attention
from fastpref.attention import Segments
from fastpref.data.dataset import TokenGroup
from fastpref.data.packing import PackedRow, pack_groups
from fastpref.model.layout_check import relative_error

NAME = "fastpref_packed"
OUT_OF_MEMORY = torch.OutOfMemoryError
# Arguments of an attention function that do not change its output, or not in training.
_WITHOUT_EFFECT = frozenset(
    {
        "attentions_to_return",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def register() -> str:
    """Register the attention with transformers; return its name for `attn_implementation`.

    No mask function is registered, so transformers builds no mask: the segments replace it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


@contextmanager
def without(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which a model attends by code that knows masks and key-value caches."""
    if model.config._attn_implementation != NAME:
        yield
        return
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # the model does not support it
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (N, H, L, D)
    key: Tensor,  # (N, H', L, D), H a multiple of H'
    value: Tensor,  # (N, H', L, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """Causal attention (N, L, H, D) of each token to its response and that response's prompt.

    Without `segments` every row is one sequence, padded on the right if at all. A window counts
    positions within the unpacked sequence. Raises ValueError for a mask, for dropout and for an
    argument that is not known, such as the sinks of gpt-oss.
    """
    if problem := argument_problem(module, attention_mask, dropout, others):
        raise ValueError(
            f"{NAME} attention expected no mask and no dropout, got {problem}; pad on the right, "
            "and set the model's attention dropout to 0"
        )
    # Under autocast a rotary embedding may leave queries and keys wider than the values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    count, length = query.shape[0], query.shape[2]
    segments = attention.rows(count, length) if segments is None else segments
    options: dict[str, Any] = {"window": sliding_window, "softcap": softcap}
    if query.is_cuda and attention.implementation(query, **options) == "by_segment":
        return _flex(module, query, key, value, segments, scaling, **options)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = attention.packed_attention(q, k, v, segments, scale=scaling, **options)
    return output.unflatten(0, (count, length)), None


def argument_problem(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    others: Mapping[str, Any],
) -> str:
    """Argument of an attention call that is not known, as a message says it; empty if none."""
    if attention_mask is not None:
        return "a mask"
    if dropout:
        return f"dropout {dropout}"
    is_causal = others.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        return "no causal order"
    unknown = [
        name
        for name, value in others.items()
        if value is not None and name != "is_causal" and name not in _WITHOUT_EFFECT
    ]
    return f"an option {min(unknown)}" if unknown else ""


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Any]:
    """FlexAttention over rows that are joined to one, (1, H, P, D)."""
    from transformers import AttentionInterface

    joined = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    mask = block_mask(segments, window, query.device)
    output, _ = AttentionInterface()["flex_attention"](
        module, *joined, mask, scaling=scaling, softcap=softcap
    )
    return output.view(query.shape[0], query.shape[2], *output.shape[2:]), None


def block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """FlexAttention block mask of a packed row, built once for all layers with the same window."""
    if (window, device) not in segments.cache:
        columns = (
            np.arange(len(segments.sizes)).repeat(segments.sizes),
            segments.prompts.repeat(segments.sizes),
            segments.positions,
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
        segments.cache[window, device] = create(mask_mod, None, None, size, size, device)
    return segments.cache[window, device]


@cache
def _create_block_mask(device_type: str) -> Any:
    """Return `create_block_mask`, compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask

    # The compiled function does not materialize the (P, P) mask.
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


@torch.no_grad()
def packing_error(
    model: Any,
    groups: Sequence[TokenGroup],
    packed_hidden: Callable[[PackedRow], Tensor] | None = None,
) -> float:
    """Largest relative error of the hidden states that predict labels, packed against unpacked.

    `max_t ‖h_t − h'_t‖ / ‖h'_t‖`, where h' is computed from each sequence alone with the attention
    implementation of the Hugging Face model, which is restored; inf if the model cannot take a
    packed row. Errors that begin at some length, such as a window that the layers do not pass on,
    show only in groups of that length.

    packed_hidden: function from a row to its hidden states (P, D); None for the model with
        `packed_attention`.
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
    row = pack_groups(groups, sequences)
    try:
        if packed_hidden is not None:
            packed = packed_hidden(row)[row.predictor_positions.to(model.device)]
        else:
            model.set_attn_implementation(register())
            if model.config._attn_implementation != NAME:
                return math.inf
            packed = hidden_states(row, segments=row.segments)
        return relative_error(packed, expected)
    # The model's forward does not accept `segments`, or builds a mask.
    except (TypeError, ValueError):
        return math.inf
    finally:
        model.set_attn_implementation(original)
        model.train(was_training)
