"""A judge that is a model of this process: what reward models and models that compare share."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastpref.data.tokenize import chunks
from fastpref.evaluation.judge.cache import Cache
from fastpref.utils.progress import Display

T = TypeVar("T")


@dataclass(frozen=True)
class ModelJudge:
    """Base of the judges of a model with `source`, `fingerprint` and `dtype`.

    bradley_terry: the preference is σ(margin) instead of 1, ½ or 0.
    """

    model: Any
    batch_size: int = 8
    bradley_terry: bool = False

    @property
    def name(self) -> str:
        source: str = self.model.source
        return source

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the verdicts."""
        return {
            "model": self.name,
            "fingerprint": self.model.fingerprint,
            "dtype": self.model.dtype,
            "bradley_terry": self.bradley_terry,
        }

    def preference(self, margin: float) -> float:
        """Preference, in [0, 1], for the answer that is better by a margin."""
        value = torch.tensor(margin, dtype=torch.float64)
        return float(value.sigmoid() if self.bradley_terry else (value.sign() + 1) / 2)

    def compute(
        self,
        pending: list[tuple[str, T]],
        total: int,
        tokens: Callable[[T], Sized],
        values: Callable[[list[T]], list[float]],
        field: str,
        cache: Cache,
        display: Display,
    ) -> None:
        """Add the values of pending items to the cache, under their keys, batch by batch.

        total: number of items with those in the cache. tokens: of an item; neighbors of similar
        length need little padding. field: name of a value in its record.
        """
        pending = sorted(pending, key=lambda item: len(tokens(item[1])))
        done = total - len(pending)
        display.phase("judge", total, done)
        for batch in chunks(pending, self.batch_size):
            results = values([item for _, item in batch])
            for (key, _), value in zip(batch, results, strict=True):
                cache.add(key, {"model": self.name, field: value})
            done += len(batch)
            display.advance(done)
