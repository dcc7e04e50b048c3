"""Padded and packed batches of hidden states and labels, for the tests of fused losses."""

from __future__ import annotations

import torch

V, D = 23, 6


def batch(pairs=3, length=5, seed=0, dtype=torch.float64):
    """Padded hidden states and shifted labels; sequence 1 has no scored token."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (2 * pairs, length), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.4] = -100
    labels[1] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def packed(hidden, labels, kept=None):
    """The same batch without padding; `kept` (S, L) bool says which positions to keep."""
    kept = labels != -100 if kept is None else kept
    lengths = torch.tensor([0, *kept.sum(1).tolist()])
    return hidden[kept], labels[kept], lengths.cumsum(0)


def gradients(run, *leaves):
    """The value of a function, and its gradients with respect to its arguments."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    loss = run(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
