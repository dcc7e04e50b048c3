"""The learner of on-policy distillation: optimizer steps on all samples of a round."""

from __future__ import annotations

import torch

from fastpref.data.streaming import in_memory
from fastpref.logps import segment_offsets
from fastpref.losses.rollout import DistillationOptions
from fastpref.online.rollouts import Rollouts
from fastpref.rounds.distillation_trainer import DistillationTrainer
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.sample_learner import SampleLearner
from fastpref.rounds.steps import setup_of
from fastpref.training.setup import DataSplit


class DistillationLearner(SampleLearner[DistillationTrainer]):
    """Takes optimizer steps toward the teacher on the samples of a round; scores only measure."""

    def make_trainer(self, split: DataSplit) -> DistillationTrainer:
        session = self._session
        assert session.teacher is not None and isinstance(session.loss, DistillationOptions)
        return DistillationTrainer(
            session.config,
            session.display,
            setup_of(self._rounds, split, self._sums.tensors),
            session.teacher,
            session.loss,
            self._sums,
        )

    def rollouts(self, split: DataSplit, key: str, round_: RoundSamples) -> Rollouts:
        """Lengths and scores of the samples; there are no log-probs to compare with."""
        device = self._session.device
        lengths = torch.from_numpy(in_memory(split.groups).response_lengths).long()
        return Rollouts(
            segment_offsets(lengths).to(device),
            old_logps=torch.zeros(int(lengths.sum()), device=device),
            rewards=round_.rewards.flatten().to(device),
        )

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """The loss, the mean over the steps of the round."""
        means = self._sums.means()
        return {"loss": means["loss"]} if "loss" in means else {}
