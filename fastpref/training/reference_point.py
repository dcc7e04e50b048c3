"""The point that KTO and BCO hold the rewards of a step against.

KTO: the mean log-ratio of mismatched responses over all rows of the step, by one more forward pass
without gradient, before the losses of the step. BCO: the mean of all rewards of the steps before,
0 at first, where all rewards are 0 too. The authors' mean takes in the current batch, which would
need a second forward pass or depend on the micro-batches; the two differ by less and less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import distributed
from fastpref.logps import UnpairedLogps
from fastpref.losses import Logps, Output, PointwiseLoss, PointwiseOutput
from fastpref.losses.pointwise import KTO, RunningMean, pooled_mean, sum_and_count
from fastpref.model.policy import Policy
from fastpref.training.setup import DataSplit

State = dict[str, float]


class ReferencePoint:
    """That of an objective which has none: the calls of the trainer, in their order."""

    def of_step(self, split: DataSplit, number: int) -> Tensor | None:
        """The point () for the losses of step `number` of a split; None where there is none."""
        return None

    def see(self, policy: Logps, output: Output) -> None:
        """Take note of the results of one micro-batch of training."""

    def end_step(self) -> None:
        """Take in what was seen: from now on it counts."""

    def drop_step(self) -> None:
        """Forget what was seen since the last step."""

    def state(self) -> State:
        """What a checkpoint must hold, as numbers that JSON gives back exactly."""
        return {}

    def restore(self, state: State) -> None:
        """Continue from a result of `state`."""


class MismatchedMean(ReferencePoint):
    """KTO's: an estimate of the KL divergence from the reference, in nats; may be negative."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def of_step(self, split: DataSplit, number: int) -> Tensor:
        mismatched, policy = split.mismatched, self._policy
        assert mismatched is not None
        was_training = policy.training
        sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
        policy.eval()
        for indices in mismatched.plan.step(number):
            for batch in mismatched.batches(policy, indices):
                reference = mismatched.reference(batch)
                assert reference is not None
                ratios = policy(batch).logps - reference.logps
                if indices:
                    sums += sum_and_count(ratios, batch.lengths)
        policy.train(was_training)
        return pooled_mean(distributed.all_reduce_sum_(sums))


class RewardMean(ReferencePoint):
    """BCO's: the mean of all rewards of the steps before."""

    def __init__(self, device: torch.device) -> None:
        self._mean = RunningMean(device)
        self._seen = torch.zeros(2, dtype=torch.float64, device=device)

    def of_step(self, split: DataSplit, number: int) -> Tensor:
        return self._mean.mean

    def see(self, policy: Logps, output: Output) -> None:
        assert isinstance(policy, UnpairedLogps) and isinstance(output, PointwiseOutput)
        self._seen += sum_and_count(output.rewards, policy.lengths)

    def end_step(self) -> None:
        self._mean.update(distributed.all_reduce_sum_(self._seen))
        self.drop_step()

    def drop_step(self) -> None:
        self._seen.zero_()

    def state(self) -> State:
        return {name: value.item() for name, value in self._mean.state_dict().items()}

    def restore(self, state: State) -> None:
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items()}
        self._mean.load_state_dict(tensors)


def reference_point(loss: object, policy: Policy) -> ReferencePoint:
    """What an objective needs of the above."""
    if not (isinstance(loss, PointwiseLoss) and loss.needs_reference_point):
        return ReferencePoint()
    return MismatchedMean(policy) if isinstance(loss, KTO) else RewardMean(policy.device)
