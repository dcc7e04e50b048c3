"""The trainer of on-policy distillation on the samples of a round."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpref import ops
from fastpref.config import Config
from fastpref.data.collate import Batch
from fastpref.data.streaming import in_memory
from fastpref.logps import segment_sum
from fastpref.losses.rollout import DistillationOptions
from fastpref.model.policy import Policy
from fastpref.online.distillation import divergences, states
from fastpref.ops.divergence import Kind
from fastpref.rounds.rollout_sums import RoundSums
from fastpref.rounds.sample_trainer import SampleStep, SampleTrainer
from fastpref.training.profiler import part
from fastpref.training.setup import MicroBatch, TrainingSetup
from fastpref.utils.progress import Display

KINDS: dict[str, Kind] = {"reverse_kl": "reverse", "forward_kl": "forward", "jsd": "jsd"}


class DistillationTrainer(SampleTrainer):
    """Trainer whose loss is the divergence of each token's distributions from a teacher's."""

    def __init__(
        self,
        config: Config,
        display: Display,
        run: TrainingSetup,
        teacher: Policy,
        options: DistillationOptions,
        round_sums: RoundSums,
    ) -> None:
        super().__init__(config, display, run, round_sums)
        self._teacher, self._options = teacher, options

    def divisor(self, lengths: Tensor) -> Tensor:
        return lengths.sum()

    def losses(self, micro_batch: MicroBatch, step: SampleStep) -> Iterator[tuple[Batch, Tensor]]:
        # The teacher may have another layout.
        groups = in_memory(self.run.train.groups)
        of_teacher = self._teacher.batches(groups, micro_batch.groups)
        for batch, other in zip(micro_batch.batches, of_teacher, strict=True):
            yield batch, self._backward(batch, other, step)

    def _backward(self, batch: Batch, of_teacher: Batch, step: SampleStep) -> Tensor:
        """Add a batch to the gradients; return the summed divergence of each response, (S,)."""
        options, policy = self._options, self.policy
        with part("forward and loss"):
            hidden = states(policy, batch)
            by_token = divergences(
                policy, hidden, self._teacher, of_teacher,
                KINDS[options.divergence], options.beta, options.temperature,
            )  # fmt: skip
            loss = segment_sum(by_token, batch.cu_seqlens)
        with part("backward"):
            rollouts = self.rollouts.select(batch.responses)
            self.gradient.backward(loss.sum() / step.divisor, batch.view(loss), 1.0)
        entropy = self._entropy(hidden.detach(), batch) if step.with_entropy else None
        share = loss.detach().double().sum(), len(by_token)
        step.sums.add(share, by_token.detach(), None, rollouts, None, entropy)
        return loss

    @torch.no_grad()
    def _entropy(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Entropies of the policy summed over the tokens, nats, and their number, (2,)."""
        weight, bias = self.policy.head()
        stats = ops.token_stats(hidden, weight, batch.labels, bias=bias, **self.policy.head_options)
        return torch.stack([stats.entropy.sum(), stats.entropy.new_tensor(len(batch.labels))])
