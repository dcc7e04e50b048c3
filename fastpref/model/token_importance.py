"""Importance of each response token by gradient attribution (for TI-DPO).

    importance_t = || d M / d E_t ||_1

with E_t the input embedding of response token t and M the largest logit at the last position of its
response (arXiv:2505.19653). It costs one forward and one backward pass through the trunk to the
embeddings. No parameter gradient is computed or changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastpref.data.collate import Batch
    from fastpref.model.policy import Policy


@torch.enable_grad()
def importance(policy: Policy, batch: Batch) -> Tensor:
    """Importance of each label (T,), in fp32 or fp64, without gradient.

    Scale and cap of the logits are left out: they multiply the importance of all tokens of a
    response by one number, and objectives use only the share of each token.
    """
    embeddings = policy.base.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    last_positions = batch.label_positions[batch.cu_seqlens[1:] - 1]
    last_hidden = policy.hidden_states(batch, embeddings).index_select(0, last_positions)
    norms = gradient_norms(last_hidden, *policy.head(), embeddings)
    return norms.flatten().index_select(0, batch.label_positions)


def gradient_norms(
    last_hidden: Tensor,  # (S, D) hidden states at the last positions of the sequences
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    embeddings: Tensor,  # (..., E) leaf that `last_hidden` is computed from
) -> Tensor:  # (...)
    """L1 norm of the gradient of the sum of the S largest logits with respect to each embedding."""
    max_logits = torch.nn.functional.linear(last_hidden, weight, bias).amax(1)
    (gradient,) = torch.autograd.grad(max_logits.sum(), embeddings)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.to(dtype), 1, -1)


def token_importance(
    causal_lm: Any,
    input_ids: Tensor,  # (S, L)
    attention_mask: Tensor,  # (S, L)
) -> Tensor:  # (S, L)
    """Importance of each token for the largest logit at the end of its sequence.

        importance[s, t] = || d M_s / d E_st ||_1

    M_s is the largest logit at the last position of sequence s, E_st the input embedding of its
    token t. Scale and cap of the logits are left out: they multiply all tokens of a sequence by one
    number, and `ti_dpo` uses only the share of each token. It costs one forward and one backward
    pass; parameters get no gradient. Source: arXiv:2505.19653.
    """
    embeddings: list[Tensor] = []

    def replace_by_leaf(module: Any, arguments: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = causal_lm.get_input_embeddings().register_forward_hook(replace_by_leaf)
    try:
        with torch.enable_grad():
            hidden = causal_lm.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
    finally:
        handle.remove()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_positions = (positions * attention_mask).argmax(1)
    head = causal_lm.get_output_embeddings()
    with torch.enable_grad():
        last_hidden = hidden[torch.arange(len(hidden), device=hidden.device), last_positions]
        return gradient_norms(last_hidden, head.weight, head.bias, embeddings[0])
