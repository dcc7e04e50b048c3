"""How much each response token matters to the model, by gradient attribution (for TI-DPO).

    importance_t = || d M / d E_t ||_1

with E_t the input embedding of response token t and M the largest logit at the last position of its
response (arXiv:2505.19653). It costs a forward and a backward pass over the trunk, down to the
embeddings; no gradient of a parameter is made or touched.
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
    """Importance of the token of each label, (T,), in fp32 at least, without gradient.

    Scale and cap of the logits are left out: they multiply the importance of all tokens of a
    response by one number, and an objective looks at shares.
    """
    embeddings = policy.base.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    ends = batch.label_positions[batch.cu_seqlens[1:] - 1]
    last = policy.hidden_states(batch, embeddings).index_select(0, ends)
    of_all = gradient_norms(last, *policy.head(), embeddings)
    return of_all.flatten().index_select(0, batch.label_positions)


def gradient_norms(
    last: Tensor,  # (S, D) hidden states at the ends of the sequences
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    embeddings: Tensor,  # (..., E) leaves that the hidden states come from
) -> Tensor:  # (...)
    """L1 norm of the gradient that each embedding gets from the largest logits, summed over S."""
    largest = torch.nn.functional.linear(last, weight, bias).amax(1)
    (gradient,) = torch.autograd.grad(largest.sum(), embeddings)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.to(wide), 1, -1)


def token_importance(
    causal_lm: Any,
    input_ids: Tensor,  # (S, L)
    attention_mask: Tensor,  # (S, L)
) -> Tensor:  # (S, L)
    """How strongly the largest logit at the end of a sequence depends on each of its tokens.

        importance[s, t] = || d M_s / d E_st ||_1

    M_s is the largest logit at the last position of sequence s, E_st the input embedding of its
    token t. Scale and cap of the logits are left out: they multiply all tokens of a sequence by one
    number, and `ti_dpo` looks at shares. One forward and one backward pass, to the embeddings
    alone: parameters get no gradient. Source: arXiv:2505.19653.
    """
    embeddings: list[Tensor] = []

    def as_leaf(module: Any, arguments: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = causal_lm.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            hidden = causal_lm.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
    finally:
        handle.remove()
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (position * attention_mask).argmax(1)
    head = causal_lm.get_output_embeddings()
    with torch.enable_grad():
        ends = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return gradient_norms(ends, head.weight, head.bias, embeddings[0])
