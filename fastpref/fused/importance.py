"""How much each token matters to the model, by gradient attribution: for `ti_dpo`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.attribution import gradient_norms


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
