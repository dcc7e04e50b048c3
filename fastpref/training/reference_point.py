"""The reference point of KTO and BCO, to which they compare the rewards of a step.

KTO: the mean log-ratio of mismatched responses over all rows of the step, by one more forward pass
without gradient, before the losses of the step. BCO: the mean of all rewards of the steps before,
0 at first, where all rewards are 0 too. The authors' mean includes the current batch, which would
need a second forward pass or depend on the micro-batches; the difference vanishes with the steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.logps import UnpairedLogps
from fastpref.losses import Objective, Output, PointwiseLoss, PointwiseOutput
from fastpref.losses.pointwise import KTO, RunningMean, pooled_mean, sum_and_count
from fastpref.model.policy import Policy
from fastpref.training.forward import MicroBatchLogps
from fastpref.training.setup import DataSplit
from fastpref.training.step_hook import StepHook


class ReferencePoint(StepHook):
    """No-op reference point, for objectives without one."""

    def of_step(self, split: DataSplit, number: int) -> Tensor | None:
        """Return the point () for the losses of step `number` of a split, or None without one."""
        return None


class MismatchedMean(ReferencePoint):
    """Reference point of KTO: an estimate of KL(policy || reference) in nats; may be negative."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def of_step(self, split: DataSplit, number: int) -> Tensor:
        mismatched, policy = split.mismatched, self._policy
        assert mismatched is not None
        was_training = policy.training
        sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
        policy.eval()
        for micro_batch in mismatched.micro_batches(policy, number):
            for batch in micro_batch.batches:
                reference = mismatched.reference(batch)
                assert reference is not None
                ratios = policy(batch).logps - reference.logps
                if micro_batch.is_real:
                    sums += sum_and_count(ratios, batch.lengths)
        policy.train(was_training)
        return pooled_mean(distributed.all_reduce_sum_(sums))


class RewardMean(ReferencePoint):
    """Reference point of BCO: the mean of all rewards of the steps before."""

    def __init__(self, device: torch.device) -> None:
        self._mean = RunningMean(device)
        self._step_sums = torch.zeros(2, dtype=torch.float64, device=device)

    def of_step(self, split: DataSplit, number: int) -> Tensor:
        return self._mean.mean

    def after_micro_batch(self, groups: list[int], logps: MicroBatchLogps, output: Output) -> None:
        assert isinstance(logps.policy, UnpairedLogps) and isinstance(output, PointwiseOutput)
        self._step_sums += sum_and_count(output.rewards, logps.policy.lengths)

    def after_step(self) -> None:
        self._mean.update(distributed.all_reduce_sum_(self._step_sums))
        self.discard_step()

    def discard_step(self) -> None:
        self._step_sums.zero_()

    def state_dict(self) -> dict[str, float]:
        return {name: value.item() for name, value in self._mean.state_dict().items()}

    def load_state_dict(self, state: Any) -> None:
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items()}
        self._mean.load_state_dict(tensors)


def make_reference_point(loss: Objective, policy: Policy) -> ReferencePoint:
    """Make the reference point that an objective needs."""
    if not (isinstance(loss, PointwiseLoss) and loss.needs_reference_point):
        return ReferencePoint()
    return MismatchedMean(policy) if isinstance(loss, KTO) else RewardMean(policy.device)
