"""Pairs of responses token by token, for the tests of objectives that look at tokens."""

from __future__ import annotations

import dataclasses

import torch

from fastpref.logps import TokenLogps

# One token, none, two of the same length, and both orders of unequal ones.
LENGTHS = ([1, 5, 0, 7, 3, 11], [4, 5, 6, 2, 0, 1])


def token_batch(soft=False, dtype=torch.float64, weights=False, lengths=LENGTHS, seed=0):
    """Random policy, with every column, and reference: log-ratios of about one nat a token."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0, *lengths[0], *lengths[1]])
    tokens, pairs = int(sizes.sum()), len(lengths[0])

    def random():
        return torch.rand(tokens, generator=g, dtype=torch.float64).to(dtype)

    logps = -0.01 - 4 * random()
    policy = TokenLogps(
        logps,
        sizes.cumsum(0),
        torch.rand(pairs, generator=g, dtype=torch.float64).to(dtype) if soft else None,
        weights=2 * random() if weights else None,
        kl=3 * random(),
        importance=random(),
        collision_entropy=2 * random(),
    )
    return policy, TokenLogps(logps + 2 * random() - 1, policy.cu_seqlens)


def responses(policy, values):
    """Values (T,) as one list of numbers per response, chosen ones first."""
    return [part.tolist() for part in values.split(policy.lengths.tolist())]


def plain(policy):
    """The same pairs with the log-probs alone."""
    return TokenLogps(policy.logps, policy.cu_seqlens, policy.preference)


def without(policy, *columns):
    """The same pairs without these columns."""
    return dataclasses.replace(policy, **dict.fromkeys(columns))


def on_meta(policy):
    """The same shapes without values: reading one back, as a host sync would, raises."""
    columns = {
        field.name: getattr(policy, field.name)
        for field in dataclasses.fields(policy)
        if getattr(policy, field.name) is not None
    }
    return TokenLogps(**{name: value.to("meta") for name, value in columns.items()})
