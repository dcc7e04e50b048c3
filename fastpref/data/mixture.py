"""Order of an epoch over several sources, with exact numbers of groups from each.

Source s has n_s groups, and an epoch takes c_s of them. The shuffled groups of a source are a
stream, one permutation of all of them after the other, and each epoch takes the next c_s: a source
that is repeated or cut shows each group as often as any other, give or take one. Within an epoch
the groups of a source are spread evenly: the first k groups hold k · c_s / Σ c of source s, give or
take two. All of it depends on the sizes, the seed and the epoch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fastpref.config.sources import Source
from fastpref.data.readers import DataError

Order = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Mixture:
    """Sources whose groups are adjacent in the data set, in this order.

    names: of the sources. sizes: groups of each. counts: groups that an epoch takes of each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, sources: Sequence[Source], sizes: Sequence[int]) -> Mixture:
        """Mixture by the weights or shares of sources; DataError if an epoch has none of one."""
        shares = [source.share for source in sources if source.share is not None]
        if shares:
            counts = apportion(sum(sizes), shares)
        else:
            weights = (1.0 if source.weight is None else source.weight for source in sources)
            counts = [round(weight * size) for weight, size in zip(weights, sizes, strict=True)]
        for source, size, count in zip(sources, sizes, counts, strict=True):
            if count == 0:
                raise DataError(
                    f"data.train: {source.label} is so small a part that an epoch has none of its "
                    f"{size:,} groups; raise its weight or share"
                )
        return cls(tuple(source.label for source in sources), tuple(sizes), tuple(counts))

    def __len__(self) -> int:
        """Number of groups of an epoch."""
        return sum(self.counts)

    def order(self, seed: int, epoch: int) -> Order:
        """Indices of the groups of an epoch into the data set, (len(self),)."""
        return _order(self, seed, epoch)

    def sources_of(self, indices: Sequence[int] | Order) -> Order:
        """Source of each group, by its index into the data set."""
        return np.searchsorted(np.cumsum(self.sizes), indices, side="right")

    def summary(self, unit: str) -> list[str]:
        """A line for each source about its part of an epoch."""
        return [
            f"{name}: {count:,} {unit}s an epoch, {count / len(self):.2%}"
            + ("" if count == size else f", {count / size:.3g} times its {size:,}")
            for name, size, count in zip(self.names, self.sizes, self.counts, strict=True)
        ]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers with this sum, in proportion to the shares, by the largest remainders."""
    exact = np.array(shares) / sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest] += 1
    return [int(count) for count in counts]


# Cached because every step of an epoch reads it.
@lru_cache(maxsize=1)
def _order(mixture: Mixture, seed: int, epoch: int) -> Order:
    starts = np.random.default_rng([seed, epoch]).random(len(mixture.sizes))
    indices, places = [], []
    first = 0
    for source, (size, count) in enumerate(zip(mixture.sizes, mixture.counts, strict=True)):
        indices.append(first + _stream(seed, source, size, epoch * count, count))
        places.append((np.arange(count) + starts[source]) / count)
        first += size
    return np.concatenate(indices)[np.argsort(np.concatenate(places), kind="stable")]


def _stream(seed: int, source: int, size: int, start: int, count: int) -> Order:
    """Entries [start, start + count) of the permutations of a source, one after the other."""
    passes = range(start // size, -(-(start + count) // size))
    shuffled = [np.random.default_rng([seed, k, source]).permutation(size) for k in passes]
    begin = start - passes.start * size
    return np.concatenate(shuffled)[begin : begin + count]
