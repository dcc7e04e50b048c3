"""Sampling from the geometric mixture of two models, the opponent of Nash-MD."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpref.data.tokenize import chunks
from fastpref.model import packed_attention
from fastpref.model.generate import Sequences, until_end
from fastpref.model.policy import Policy
from fastpref.online.nash_md import mixture_logits


@torch.no_grad()
def sample_mixture(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    *,
    mixture: float,
    max_new_tokens: int,
    batch_size: int = 16,
    generator: torch.Generator,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Sequences:
    """Sample a completion of each prompt, token by token, up to the first of `ends`, included.

    The distribution of a token is ∝ π^(1 − mixture) · π_ref^mixture at temperature 1. The models
    are two, or one with an adapter, and each has a cache of its own. generator: on the device of
    the policy. around: context manager in which `reference` is the reference, if it is the policy.
    """
    completions: Sequences = []
    for part in chunks(prompts, batch_size):
        width = max(map(len, part))
        padding = [width - len(ids) for ids in part]
        ids = [[0] * k + list(ids) for k, ids in zip(padding, part, strict=True)]
        mask = [[0] * k + [1] * (width - k) for k in padding]
        inputs, attended = (torch.tensor(x, device=policy.device) for x in (ids, mask))
        decoders = _Decoder(policy), _Decoder(reference, around)
        rows = _sample(decoders, inputs, attended, ends, mixture, max_new_tokens, generator)
        completions += [until_end(row, ends).tolist() for row in rows]
    return completions


def _sample(
    decoders: tuple[_Decoder, _Decoder],
    inputs: Tensor,  # (B, L)
    mask: Tensor,  # (B, L)
    ends: set[int],
    mixture: float,
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Tokens of each completion, until all have ended; those after an end are padding."""
    tokens: list[Tensor] = []
    end_tokens = inputs.new_tensor(sorted(ends))
    alive = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    while len(tokens) < max_new_tokens and bool(alive.any()):
        policy, reference = (decoder.next_logits(inputs, mask) for decoder in decoders)
        probabilities = mixture_logits(policy, reference, mixture).softmax(-1)
        inputs = torch.multinomial(probabilities, 1, generator=generator)
        tokens.append(inputs)
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        alive &= ~torch.isin(inputs[:, 0], end_tokens)
    rows: list[list[int]] = torch.cat(tokens, dim=1).tolist()
    return rows


class _Decoder:
    """Next-token logits of a model that remembers the tokens before."""

    def __init__(
        self, policy: Policy, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._policy, self._around, self._cache = policy, around, None
        self._accepts = inspect.signature(policy.base.forward).parameters

    def next_logits(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, V), fp32 or wider, after the new tokens (B, N); mask (B, all tokens)."""
        options: dict[str, Any] = {"use_cache": True, "past_key_values": self._cache}
        if "position_ids" in self._accepts:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -inputs.shape[1] :]
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = 1
        base: Any = self._policy.base
        with self._around(), self._policy.autocast(), packed_attention.without(base):
            output = base(input_ids=inputs, attention_mask=mask, **options)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
