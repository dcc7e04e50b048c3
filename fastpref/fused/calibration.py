"""Reward Calibration of the calls of an optimizer step, in somebody else's training loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import losses, ops
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import BatchStatistics, RewardCalibration, calibrated
from fastpref.fused.averages import Averages
from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.losses import Logps, Objective, TokenLevelLoss

Head = tuple[Tensor, Tensor, Tensor | None]  # hidden states (T, D), weight (V, D), bias (V,)


class StepCalibration(Averages[Any]):
    """Calibrate a number of calls by the statistics of the steps before, and then update these."""

    def __init__(
        self,
        method: RewardCalibration | PairCalibration,
        loss: Objective,
        calls: int,  # of an optimizer step
        head_options: dict[str, Any],
    ) -> None:
        super().__init__(method)
        self._loss, self._calls = loss, calls
        self._head_options = head_options
        self._done = 0  # calls since the last update
        self._sums: list[Tensor] = []  # over the pairs of these calls

    def token_logps(self, tokens: ScoredTokens, head: Head) -> tuple[Tensor, Tensor | None]:
        """Log-probs (T,), and the sums of scores of this call if they need no token weights."""
        if isinstance(self.source, PairCalibration) or isinstance(self._loss, TokenLevelLoss):
            return tokens.token_logps(*head, **self._head_options), None
        hidden, weight, _ = head
        logps, scores = ops.linear_logps_and_scores(
            hidden, weight, tokens.labels, _chosen_tokens(tokens), **self._head_options
        )
        return logps, scores

    def calibrate(
        self,
        policy: Logps,
        reference: Logps | None,
        tokens: ScoredTokens,
        head: Head,
        scores: Tensor | None,
        loss_impl: str,
    ) -> Logps:
        """The policy's log-probs with calibrated gradients; records the statistics of the call."""
        d_w, d_l, token_weights = losses.pair_incentives(
            self._loss, policy, reference, impl=loss_impl
        )
        d_w, d_l = d_w.detach().double(), d_l.detach().double()
        hidden, weight, _ = head
        arguments = hidden.detach(), weight.detach(), tokens.labels
        method = self.on(hidden.device)
        pairs: Any = policy
        if isinstance(method, PairCalibration):
            geometry = ops.score_geometry(
                *arguments, tokens.cu_seqlens, token_weights=token_weights, per_pair=True,
                **self._head_options,
            )  # fmt: skip
            policy, _, sums = method.calibrate(pairs, (d_w, d_l), geometry)
            self._add(sums)
            if self._done == self._calls:
                method.update(*self._reduced())
                self.store()
            return policy
        if scores is None:
            _, scores = ops.linear_logps_and_scores(
                *arguments, _chosen_tokens(tokens), token_weights=token_weights,
                **self._head_options,
            )  # fmt: skip
        incentives = torch.stack([d_w.sum(), d_l.sum(), d_w.new_tensor(len(d_w))])
        self._add(incentives, scores)
        if self._calls == 1:  # the step is known before its backward pass
            statistics = BatchStatistics.of_sums(*self._reduced())
            factor, _ = method.factor(statistics)
            method.update(statistics)
            self.store()
            return calibrated(pairs, factor)
        factor, _ = method.factor()
        if self._done == self._calls:
            method.update(BatchStatistics.of_sums(*self._reduced()))
            self.store()
        return calibrated(pairs, factor)

    def _add(self, *sums: Tensor) -> None:
        """Add the sums of a call to those of its step."""
        added = self._done > 0
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if added else [*sums]
        self._done += 1

    def _reduced(self) -> list[Tensor]:
        """Sums of a complete step over all ranks; the next call begins another step."""
        sums, self._sums, self._done = self._sums, [], 0
        if dist.is_available() and dist.is_initialized():
            for total in sums:
                dist.all_reduce(total)
        return sums


def _chosen_tokens(tokens: ScoredTokens) -> int:
    """Number of tokens of the chosen responses; on a GPU this waits for the offsets."""
    return int(tokens.cu_seqlens[len(tokens.cu_seqlens) // 2])
