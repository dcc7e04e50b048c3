"""The trainer of PPO, GRPO and Nash-MD on the samples of a round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.collate import Batch
from fastpref.model.policy import ForwardOptions, PolicyOutput
from fastpref.online.nash_md import NashMD
from fastpref.online.objectives import RolloutObjective
from fastpref.online.ppo import PPO
from fastpref.online.rollouts import Rollouts
from fastpref.online.value_steps import ValueSteps
from fastpref.rounds.rollout_sums import RoundSums
from fastpref.rounds.sample_trainer import SampleStep, SampleTrainer
from fastpref.training.profiler import part
from fastpref.training.setup import MicroBatch, TrainingSetup
from fastpref.utils.progress import Display


class RolloutTrainer(SampleTrainer):
    """Trainer on rollouts, whose loss looks at the tokens and, for PPO, at their values.

    follows: whether the reference changes within a round, so that every step runs it.
    """

    def __init__(
        self,
        config: Config,
        display: Display,
        run: TrainingSetup,
        objective: RolloutObjective,
        value: ValueSteps | None,
        round_sums: RoundSums,
        follows: bool,
    ) -> None:
        super().__init__(config, display, run, round_sums, *([] if value is None else [value]))
        self._objective, self._value, self._follows = objective, value, follows

    def divisor(self, lengths: Tensor) -> Tensor | float:
        return self._objective.divisor(lengths)

    def losses(self, micro_batch: MicroBatch, step: SampleStep) -> Iterator[tuple[Batch, Tensor]]:
        for batch in micro_batch.batches:
            yield batch, self._backward(batch, self._rollouts_of(batch), step)

    def _rollouts_of(self, batch: Batch) -> Rollouts:
        rollouts = self.rollouts.select(batch.responses)
        if self._follows:
            reference = self.run.train.reference(batch)
            assert reference is not None
            rollouts = replace(rollouts, ref_logps=reference.token_logps)
        return rollouts

    def _backward(self, batch: Batch, rollouts: Rollouts, step: SampleStep) -> Tensor:
        """Add a batch to the gradients; return the loss of each response, (S,)."""
        objective, value = self._objective, self._value
        with part("forward and loss"):
            options = ForwardOptions(entropy=step.with_entropy, head=value is not None)
            output: PolicyOutput = self.policy(batch, options)
            values = None
            if value is not None:
                assert output.head is not None
                values = value.head(output.head[0].detach())
            logps = output.token_logps
            loss = objective.loss(logps, rollouts, values)
        with part("backward"):
            self.gradient.backward(loss.sum() / step.divisor, batch.view(output.logps), 1.0)
        with torch.no_grad():
            of_values = None
            if isinstance(objective, PPO):
                of_values = objective.value_losses(values, rollouts)
            clipped = None
            if not isinstance(objective, NashMD):  # which has no ratios
                clipped = objective.clipped(logps, rollouts)
            share = loss.double().sum(), objective.divisor(rollouts.lengths)
            step.sums.add(share, logps, clipped, rollouts, of_values, output.entropy)
        return loss
