"""Prompts with responses to other prompts, from which KTO estimates its reference point."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from fastpref.data.dataset import Lengths, TokenGroup
from fastpref.data.readers import DataError
from fastpref.data.sources import Dataset
from fastpref.losses import Kind
from fastpref.utils import atomic_files


class MismatchedGroups:
    """Groups of a pointwise data set, each prompt with a response to a different prompt.

    The assignment is fixed, so an estimate from the rows of a step does not depend on
    micro-batches. In a run of L adjacent groups with the same prompt (usually L = 1), each group
    takes the response L groups later, wrapping around at the end of the data; if that group has
    the same prompt again, it takes the next one that does not. Responses are cut to `max_length`.

    Raises DataError if all prompts are the same.
    """

    kind: Kind = "pointwise"

    def __init__(self, dataset: Dataset, max_length: int) -> None:
        self.source = dataset.source
        self.fingerprint = atomic_files.sha256("mismatched", dataset.fingerprint, str(max_length))
        self.offsets, self.mixture = dataset.offsets, dataset.mixture
        self._dataset, self._max_length = dataset, max_length
        self._partners = partners(list(dataset.prompt_bytes()))
        if len(self._partners) == 0:
            raise DataError(
                f"{self.source}: kto needs responses to at least two prompts, and there is one; "
                "its reference point comes from responses to other prompts (use kto_simple or bco)"
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> TokenGroup:
        group = self._dataset[index]
        (response,) = self._dataset[int(self._partners[index])].responses
        return replace(group, responses=(response[: self._max_length - len(group.prompt)],))

    @cached_property
    def padded_lengths(self) -> Lengths:
        responses = self._dataset.response_lengths[self._partners]
        return np.minimum(self._dataset.prompt_lengths + responses, self._max_length)

    @property
    def prompt_lengths(self) -> Lengths:
        return self._dataset.prompt_lengths

    @cached_property
    def response_lengths(self) -> Lengths:
        return self.padded_lengths - self.prompt_lengths

    def given_reference_logps(self) -> None:
        """None: the columns of the data hold log-probs of matched responses only."""


def partners(prompts: list[bytes]) -> Lengths:
    """Index of the group whose response each group takes, (N,); empty if all prompts are equal."""
    count = len(prompts)
    starts = [i for i in range(count) if prompts[i] != prompts[i - 1]]
    if not starts:
        return np.empty(0, dtype=np.int64)
    indices = np.empty(count, dtype=np.int64)
    for start, end in zip(starts, [*starts[1:], starts[0] + count], strict=True):
        for position in range(start, end):
            partner = position + end - start
            while prompts[partner % count] == prompts[start]:
                partner += 1
            indices[position % count] = partner % count
    return indices
