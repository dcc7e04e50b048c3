"""Sequence log-probabilities: the output of models and the input of objectives.

All values are natural logs in nats, summed over the tokens of the response unless a name ends in
`_mean`. B is the number of preference pairs, S of single responses, G of prompts and T of response
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastpref.utils.lazy_torch import Tensor, torch


# eq=False: comparing tensors yields tensors, so a generated __eq__ could only raise.
@dataclass(frozen=True, eq=False)
class SequenceLogps:
    """Summed response log-probs of B preference pairs under one model.

    chosen, rejected: (B,) float32 or float64, nats.
    chosen_lengths, rejected_lengths: (B,) number of response tokens behind each sum.
    preference: (B,) in [0, 1], the probability that `chosen` is the better response (a soft
        label), or None for hard labels (p = 1).
    margin: (B,) by which the data ask the reward of `chosen` to be larger than that of `rejected`,
        for objectives with an offset, or None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    preference: Tensor | None = None
    margin: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        logps: Tensor,  # (2B,)
        lengths: Tensor,  # (2B,)
        preference: Tensor | None = None,  # (B,)
        margin: Tensor | None = None,  # (B,)
    ) -> SequenceLogps:
        """Split sequences ordered chosen_0..chosen_{B-1}, rejected_0..rejected_{B-1} into pairs.

        Raises ValueError when `logps` is not a float32 or float64 vector of even size, or when the
        shape of `lengths`, `preference` or `margin` does not match it.
        """
        if logps.dim() != 1 or logps.numel() % 2:
            raise ValueError(
                f"logps: expected shape (2B,), all chosen and then all rejected responses, "
                f"got {tuple(logps.shape)}"
            )
        if logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"logps: expected float32 or float64, got {logps.dtype}; a sum over thousands of "
                f"tokens does not fit half precision, so sum in float32"
            )
        if lengths.shape != logps.shape:
            raise ValueError(
                f"lengths: expected shape {tuple(logps.shape)}, one per sequence, "
                f"got {tuple(lengths.shape)}"
            )
        pairs = logps.numel() // 2
        for name, values in (("preference", preference), ("margin", margin)):
            _check_per_pair(name, values, pairs)
        return cls(
            logps[:pairs], logps[pairs:], lengths[:pairs], lengths[pairs:], preference, margin
        )

    @classmethod
    def cat(cls, parts: Iterable[SequenceLogps]) -> SequenceLogps:
        """Concatenate pairs in order; all parts have a preference, or a margin, or none."""
        parts = list(parts)
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.rejected for part in parts]),
            torch.cat([part.chosen_lengths for part in parts]),
            torch.cat([part.rejected_lengths for part in parts]),
            _cat_per_pair("preference", parts),
            _cat_per_pair("margin", parts),
        )

    def swapped(self) -> SequenceLogps:
        """The same pairs with chosen and rejected exchanged; p becomes 1 - p, a margin -margin."""
        return SequenceLogps(
            self.rejected,
            self.chosen,
            self.rejected_lengths,
            self.chosen_lengths,
            None if self.preference is None else 1 - self.preference,
            None if self.margin is None else -self.margin,
        )

    def detach(self) -> SequenceLogps:
        """The same values, detached from the autograd graph."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())


@dataclass(frozen=True, eq=False)
class UnpairedLogps:
    """Summed response log-probs of S labeled responses under one model.

    logps: (S,) float32 or float64, nats.
    lengths: (S,) number of response tokens behind each sum.
    desirable: (S,) bool, whether the response is desirable or undesirable.

    Raises ValueError if a dtype differs or a shape does not match `logps`.
    """

    logps: Tensor
    lengths: Tensor
    desirable: Tensor

    def __post_init__(self) -> None:
        _check_responses(self.logps, self.lengths)
        _check_per_response("desirable", self.desirable, self.logps)
        if self.desirable.dtype != torch.bool:
            raise ValueError(
                f"desirable: expected bool, got {self.desirable.dtype}; compare scores to a "
                f"threshold first"
            )

    @classmethod
    def cat(cls, parts: Iterable[UnpairedLogps]) -> UnpairedLogps:
        """Concatenate responses in order."""
        parts = list(parts)
        return cls(
            torch.cat([part.logps for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.desirable for part in parts]),
        )

    def detach(self) -> UnpairedLogps:
        """The same values, detached from the autograd graph."""
        return replace(self, logps=self.logps.detach())


@dataclass(frozen=True, eq=False)
class GroupedLogps:
    """Summed log-probs of S scored responses to G prompts under one model.

    logps: (S,) float32 or float64, nats.
    lengths: (S,) number of response tokens behind each sum.
    cu_groups: (G + 1,) int32 or int64 offsets, non-decreasing from 0 to S: group g has the
        responses cu_groups[g] to cu_groups[g + 1] - 1, possibly none. The values are not checked,
        since that would require a host sync.
    scores: (S,) floating point, larger is better; comparable within a group.

    Raises ValueError if a dtype differs or a shape does not match `logps`.
    """

    logps: Tensor
    lengths: Tensor
    cu_groups: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        _check_responses(self.logps, self.lengths)
        _check_per_response("scores", self.scores, self.logps)
        if not self.scores.is_floating_point():
            raise ValueError(
                f"scores: expected floating point, got {self.scores.dtype}; convert with .float()"
            )
        offsets = self.cu_groups
        if offsets.dim() != 1 or offsets.numel() == 0:
            raise ValueError(
                f"cu_groups: expected shape (G + 1,), the offsets of G groups and their end, "
                f"got {tuple(offsets.shape)}"
            )
        if offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_groups: expected int32 or int64 offsets, got {offsets.dtype}")

    @classmethod
    def cat(cls, parts: Iterable[GroupedLogps]) -> GroupedLogps:
        """Concatenate groups in order."""
        parts = list(parts)
        sizes = torch.cat([part.cu_groups.diff() for part in parts])
        return cls(
            torch.cat([part.logps for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=sizes.dtype)]),
            torch.cat([part.scores for part in parts]),
        )

    def detach(self) -> GroupedLogps:
        """The same values, detached from the autograd graph."""
        return replace(self, logps=self.logps.detach())


# Optional columns of TokenLogps with one value per pair, and with one per token.
_PAIR_COLUMNS = ("preference", "margin")
_TOKEN_COLUMNS = ("weights", "kl", "importance", "collision_entropy")


@dataclass(frozen=True, eq=False)
class TokenLogps:
    """Log-probs of the response tokens of B preference pairs under one model.

    logps: (T,) float32 or float64, nats.
    cu_seqlens: (2B + 1,) int32 or int64 offsets, non-decreasing from 0 to T, of the responses
        chosen_0..chosen_{B-1}, rejected_0..rejected_{B-1}. The values are not checked, since that
        would require a host sync.
    preference: (B,) in [0, 1], as in `SequenceLogps`.
    margin: (B,), as in `SequenceLogps`.
    weights: (T,) >= 0, weight from the data of each token's log-ratio; None means 1.
    kl: (T,) KL(reference || policy) of the distribution of each token (`ops.linear_kl`), nats,
        differentiable in the policy.
    importance: (T,) >= 0, importance of each response token. By gradient attribution this is
        I_t = ||dM/dE_t||_1, with E_t the input embedding of token t itself (not of the token that
        predicts it) and M the largest logit at the last position of its sequence.
    collision_entropy: (T,) >= 0, -log sum_v p_v^2 of the distribution of each token, nats.

    The columns after `cu_seqlens` may be None; each objective documents which it needs. Raises
    ValueError if a dtype differs or a shape does not match.
    """

    logps: Tensor
    cu_seqlens: Tensor
    preference: Tensor | None = None
    weights: Tensor | None = None
    kl: Tensor | None = None
    importance: Tensor | None = None
    collision_entropy: Tensor | None = None
    margin: Tensor | None = None

    def __post_init__(self) -> None:
        _check_logps(self.logps, "(T,), one log-prob per token")
        offsets = self.cu_seqlens
        if offsets.dim() != 1 or offsets.numel() % 2 == 0:
            raise ValueError(
                f"cu_seqlens: expected shape (2B + 1,), the offsets of B chosen and B rejected "
                f"responses and their end, got {tuple(offsets.shape)}"
            )
        if offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens: expected int32 or int64 offsets, got {offsets.dtype}")
        for name in _PAIR_COLUMNS:
            _check_per_pair(name, getattr(self, name), self.pairs)
        for name in _TOKEN_COLUMNS:
            column = getattr(self, name)
            if column is not None and column.shape != self.logps.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(self.logps.shape)}, one per token, "
                    f"got {tuple(column.shape)}"
                )
            if column is not None and not column.is_floating_point():
                raise ValueError(f"{name}: expected floating point, got {column.dtype}")

    @property
    def pairs(self) -> int:
        """Number of pairs B."""
        return self.cu_seqlens.numel() // 2

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each response, (2B,)."""
        return self.cu_seqlens.diff()

    def sequences(self, weights: Tensor | None = None) -> SequenceLogps:
        """Sum the log-probs of each response, with tokens weighted by `weights` (T,) if given.

        `self.weights` is not applied, so that policy and reference can share the argument. Lengths
        count tokens regardless of their weight.
        """
        logps = self.logps if weights is None else weights * self.logps
        return SequenceLogps.from_sequences(
            segment_sum(logps, self.cu_seqlens), self.lengths, self.preference, self.margin
        )

    @classmethod
    def cat(cls, parts: Iterable[TokenLogps]) -> TokenLogps:
        """Concatenate pairs in order; each column must be set in all parts or in none."""
        parts = list(parts)
        rejected = [
            segment_positions(part.cu_seqlens, part.logps.numel())[0] >= part.pairs
            for part in parts
        ]
        order = torch.cat(rejected).long().argsort(stable=True)
        lengths = [part.lengths[: part.pairs] for part in parts]
        lengths += [part.lengths[part.pairs :] for part in parts]
        sizes = torch.cat(lengths)
        columns: dict[str, Tensor] = {}
        for name in (*_PAIR_COLUMNS, *_TOKEN_COLUMNS):
            values = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            if values and len(values) != len(parts):
                raise ValueError(f"{name}: expected for every part or for none, got a mixture")
            if values:
                column = torch.cat(values)
                columns[name] = column if name in _PAIR_COLUMNS else column[order]
        return cls(
            torch.cat([part.logps for part in parts])[order],
            torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=sizes.dtype)]),
            **columns,
        )

    def detach(self) -> TokenLogps:
        """The same values, detached from the autograd graph."""
        kl = None if self.kl is None else self.kl.detach()
        return replace(self, logps=self.logps.detach(), kl=kl)


def segment_sum(
    values: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Sum of `values[cu_seqlens[s] : cu_seqlens[s + 1]]` for each s; an empty segment gives 0.

    `cu_seqlens` is non-decreasing with values in 0 .. T; tokens outside its range are not summed.
    Differentiable in `values`; the result has their dtype. The sum is accumulated in fp64 in a
    fixed order, because fp32 would lose whole log-probs of tokens in a long response.
    """
    # segment_reduce does not check bounds, and checking the offsets here would be a host sync.
    offsets = cu_seqlens.clamp(0, len(values))
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True)
    return sums.to(values.dtype)


def segment_offsets(lengths: Tensor) -> Tensor:
    """Offsets (S + 1,) of segments with these lengths, (S,), one after the other."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def segment_positions(
    cu_seqlens: Tensor,  # (S + 1,)
    tokens: int,
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """Segment id of each token and its position in the segment from 0, both int64."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    segment_ids = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    return segment_ids, index - cu_seqlens.long()[segment_ids]


def segment_mask(
    cu_seqlens: Tensor,  # (S + 1,)
    tokens: int,
) -> Tensor:  # (S, T) bool
    """Whether each token belongs to each segment."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    return (cu_seqlens[:-1, None] <= index) & (index < cu_seqlens[1:, None])


def mean_logps(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-prob per token, (N,) and (N,) -> (N,); 0 with zero gradient if a length is 0."""
    return torch.where(lengths > 0, logps / lengths.clamp(min=1), 0.0)


def _check_per_pair(argument: str, values: Tensor | None, pairs: int) -> None:
    if values is not None and values.shape != (pairs,):
        raise ValueError(
            f"{argument}: expected shape ({pairs},), one per pair, got {tuple(values.shape)}"
        )


def _cat_per_pair(name: str, parts: list[SequenceLogps]) -> Tensor | None:
    """A column of all parts in order; ValueError if only some have it."""
    values = [getattr(part, name) for part in parts if getattr(part, name) is not None]
    if values and len(values) != len(parts):
        raise ValueError(f"{name}: expected for every part or for none, got a mixture")
    return torch.cat(values) if values else None


def _check_responses(logps: Tensor, lengths: Tensor) -> None:
    _check_logps(logps, "(S,), one sum per response")
    _check_per_response("lengths", lengths, logps)


def _check_logps(logps: Tensor, expected: str) -> None:
    if logps.dim() != 1:
        raise ValueError(f"logps: expected shape {expected}, got {tuple(logps.shape)}")
    if logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logps: expected float32 or float64, got {logps.dtype}; a sum over thousands of "
            f"tokens does not fit half precision, so sum in float32"
        )


def _check_per_response(argument: str, values: Tensor, logps: Tensor) -> None:
    if values.shape != logps.shape:
        raise ValueError(
            f"{argument}: expected shape {tuple(logps.shape)}, one per response, "
            f"got {tuple(values.shape)}"
        )
