"""Trainers on all samples of a round: the loop of `Trainer`, with losses that look at tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.collate import Batch
from fastpref.data.streaming import in_memory
from fastpref.logps import segment_sum
from fastpref.online.rollouts import Rollouts
from fastpref.rounds.rollout_sums import RolloutSums, RoundSums
from fastpref.training.metric_sums import StepSums
from fastpref.training.setup import DataSplit, MicroBatch, TrainingSetup
from fastpref.training.step_hook import StepHook
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class SampleStep:
    """Objects of one optimizer step."""

    divisor: Tensor | float  # of the summed losses of its responses
    sums: RolloutSums
    with_entropy: bool


class SampleTrainer(Trainer):
    """Base of the trainers on all samples of a round; a subclass writes the loss of a batch.

    The hooks see steps, and no micro-batches.
    """

    rollouts: Rollouts  # of the round

    def __init__(
        self,
        config: Config,
        display: Display,
        run: TrainingSetup,
        round_sums: RoundSums,
        *hooks: StepHook,
    ) -> None:
        super().__init__(config, display, run)
        self._round_sums = round_sums
        self.hooks += [round_sums, *hooks]

    def take(self, train: DataSplit, rollouts: Rollouts) -> None:
        """Train on the rollouts of a round from the next step on; `train` has their groups."""
        self.use(train)
        self.rollouts, self._offsets = rollouts, in_memory(train.groups).offsets

    @abstractmethod
    def divisor(self, lengths: Tensor) -> Tensor | float:
        """Divisor of the summed losses of responses with these lengths, (S,)."""

    @abstractmethod
    def losses(self, micro_batch: MicroBatch, step: SampleStep) -> Iterator[tuple[Batch, Tensor]]:
        """Run each batch of a micro-batch forward and backward; yield its losses, (S,).

        The gradient is that of the sum of the losses over `step.divisor`, and the metrics are added
        to `step.sums`.
        """

    def _accumulate_gradient(self, with_entropy: bool) -> StepSums:
        """Run all micro-batches of a step forward and backward."""
        for hook in self.hooks:
            hook.before_step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        groups = self.plan.groups(self.step)
        responses = [k for g in groups for k in range(*self._offsets[g : g + 2])]
        divisor = self.divisor(self.rollouts.lengths[responses])
        step = SampleStep(divisor, RolloutSums(self.policy.device), with_entropy)
        for micro_batch in self.run.train.micro_batches(self.policy, self.step):
            self.memory.observe(micro_batch.batches)
            of_groups = [
                segment_sum(losses.detach(), batch.cu_groups)
                for batch, losses in self.losses(micro_batch, step)
            ]
            self.guard.tracker.record(micro_batch.groups, torch.cat(of_groups))
        self._round_sums.take(step.sums)
        return step.sums
