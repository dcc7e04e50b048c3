"""How much each response token matters to the model, by gradient attribution (for TI-DPO).

    importance_t = || d M / d E_t ||_1

with E_t the input embedding of response token t and M the largest logit at the last position of its
response (arXiv:2505.19653). It costs a forward and a backward pass over the trunk, down to the
embeddings; no gradient of a parameter is made or touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.data.batches import Batch
from fastpref.model import Policy


@torch.enable_grad()
def importance(policy: Policy, batch: Batch) -> Tensor:
    """Importance of the token of each label, (T,), in fp32 at least, without gradient.

    Scale and cap of the logits are left out: they multiply the importance of all tokens of a
    response by one number, and an objective looks at shares.
    """
    embeddings = policy.base.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    ends = batch.label_positions[batch.cu_seqlens[1:] - 1]
    last = policy.states(batch, embeddings).index_select(0, ends)
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
