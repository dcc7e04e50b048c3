"""DPO-PG: raise the chosen log-probs along a direction that does not raise the rejected ones.

With g_w and g_l the gradients of the batch-mean negative log-likelihoods of the chosen and the
rejected responses (Definition H.1 of "Differential Information", arXiv:2505.23761),

    g = g_w                                     where <g_w, g_l> <= 0
    g = g_w - (<g_w, g_l> / |g_l|^2) g_l        else

replaces the gradient; there is no reference and no hyperparameter. The formula is reconstructed
from the paper's proofs, which determine it. For a small step along -g,

- the mean chosen log-prob rises, strictly unless g_w is a positive multiple of g_l (Theorem H.4);
- the mean rejected log-prob does not rise (Theorem H.5).

These are statements about plain gradient descent on batch means. They hold with norm clipping,
which only shortens the step. A preconditioner (RMSprop, Adam) or momentum takes another direction,
for which neither sign is certain, and a single pair of the batch may move against the mean.
Corollary H.5.1, by which a loss of the margin falls, needs one pair, or a loss of the batch's mean
margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b> over two lists of tensors of the same shapes, () fp64, without a host sync.

    Products are in fp32 at least, their sum in fp64. Sharded tensors (DTensors of one mesh) are
    multiplied shard by shard and summed over the mesh in one collective; plain tensors are local to
    this rank and are not reduced.
    """
    plain: Any = 0.0
    sharded: Any = None
    for x, y in zip(a, b, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        term = (x.to(wide) * y.to(wide)).sum(dtype=torch.float64)
        if hasattr(term, "full_tensor"):
            sharded = term if sharded is None else sharded + term
        else:
            plain = plain + term
    return plain if sharded is None else plain + sharded.full_tensor()


@torch.no_grad()
def project_(chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> Tensor:
    """Replace `chosen`, the gradient g_w, by the projected gradient g in place; `rejected` is g_l.

    Both must be complete: summed over the micro-batches and ranks of the step. Returns the
    coefficient max(0, <g_w, g_l>) / |g_l|^2, () fp64, which is 0 without a projection. Raises
    ValueError where the lists differ in length.
    """
    if len(chosen) != len(rejected):
        raise ValueError(
            f"rejected: expected {len(chosen)} gradients as in chosen, got {len(rejected)}"
        )
    product = inner_product(chosen, rejected)
    square = inner_product(rejected, rejected)
    coefficient = torch.where(product > 0, product / square, 0.0)
    for g_w, g_l in zip(map(_local, chosen), map(_local, rejected), strict=True):
        g_w.sub_(coefficient.to(g_w.dtype) * g_l)
    return coefficient


def exchange(
    parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """Set the `.grad` of the parameters to `gradients`, and return the previous ones.

    It allows one forward pass of each micro-batch to accumulate two gradients:

        -chosen.sum().backward(retain_graph=True);  rest = exchange(parameters, rest)
        -rejected.sum().backward();                 rest = exchange(parameters, rest)
    """
    previous = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        previous.append(parameter.grad)
        parameter.grad = gradient
    return previous


def _local(tensor: Tensor) -> Tensor:
    shard: Any = tensor
    return shard.to_local() if hasattr(shard, "to_local") else tensor
