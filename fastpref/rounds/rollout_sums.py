"""Metrics of the steps on rollouts: sums of a step, and of all steps of a round."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import metrics
from fastpref.online.rollouts import Rollouts
from fastpref.training.metric_sums import ROLLOUT_METRICS
from fastpref.training.step_hook import StepHook


class RolloutSums:
    """Sums of `ROLLOUT_METRICS` over a step; nothing waits for the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = _zeros(2, len(ROLLOUT_METRICS), device=device)
        self._entropy = _zeros(2, device=device)

    @torch.no_grad()
    def add(
        self,
        loss: tuple[Tensor, Tensor | float],
        logps: Tensor,  # (T,)
        clipped: Tensor | None,  # (T,) bool
        rollouts: Rollouts,
        value_losses: Tensor | None,  # (T,)
        entropy: Tensor | None,  # (2,)
    ) -> None:
        """Add a batch.

        loss: summed loss, and its divisor. clipped: tokens without gradient.
        """
        responses, tokens = len(rollouts.rewards), len(logps)
        none = logps.new_zeros(())
        kl, beyond, values = (none, 0), (none, 0), (none, 0)
        if rollouts.ref_logps is not None:
            kl = ((logps - rollouts.ref_logps).double().sum(), responses)
        if clipped is not None:
            beyond = (clipped.double().sum(), tokens)
        if value_losses is not None:
            values = (value_losses.double().sum(), tokens)
        columns = (
            loss,
            (rollouts.rewards.double().sum(), responses),
            (tokens, responses),
            kl,
            beyond,
            values,
        )
        for row, entries in enumerate(zip(*columns, strict=True)):
            self.sums[row] += torch.stack([self.sums.new_tensor(0.0) + each for each in entries])
        if entropy is not None:
            self._entropy += entropy

    def entropy(self) -> float:
        """Mean entropy of the tokens, nats."""
        return metrics.mean(self._entropy)


class RoundSums(StepHook):
    """Sums over the steps of a round so far, in the checkpoints of the run.

    steps: of a round.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps = steps
        self._sums = _zeros(2, len(ROLLOUT_METRICS), device=device)
        self._of_step = torch.zeros_like(self._sums)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sums, no copy, by their name in a checkpoint."""
        return {"round.sums": self._sums}

    def means(self) -> dict[str, float]:
        """Means over the steps of the round."""
        return metrics.means(self._sums, ROLLOUT_METRICS)

    def take(self, sums: RolloutSums) -> None:
        """Record the sums of the step."""
        self._of_step = sums.sums

    def before_step(self, step: int) -> None:
        if step % self._steps == 0:
            self._sums.zero_()

    def after_step(self) -> None:
        self._sums += self._of_step


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=device)
