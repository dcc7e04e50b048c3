"""The learner of on-policy distillation: optimizer steps on all samples of a round."""

from __future__ import annotations

import torch

from fastpref.data.dataset import GroupDataset
from fastpref.losses.rollout import DistillationOptions
from fastpref.online.rollouts import Rollouts
from fastpref.rounds.distillation_trainer import DistillationTrainer
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.pairing import groups_of_all
from fastpref.rounds.rollout_sums import RoundSums
from fastpref.rounds.sequence import Rounds
from fastpref.rounds.steps import setup_of, view_of
from fastpref.training.setup import DataSplit


class DistillationLearner:
    """Takes optimizer steps toward the teacher on the samples of a round; scores only measure."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds, self._session = rounds, rounds.session
        self._sums = RoundSums(rounds.session.steps_per_round, rounds.session.device)
        self._trainer: DistillationTrainer | None = None

    def learn(self, round_: RoundSamples) -> dict[str, float]:
        """Train on all samples of a round; the loss is the mean over its steps."""
        rounds, number = self._rounds, round_.number
        data = rounds.round(number)
        source = str(rounds.files(number).path("scores", data.key))
        groups = groups_of_all(self._session.cache, data.samples, data.scores, source)
        view = view_of(rounds, groups, data.key, number)
        split = DataSplit(groups, view.plan, view.reference)
        trainer = self._trainer_of(split)
        trainer.take(split, self._rollouts(groups, round_))
        trainer.loop(rounds.received, until=rounds.first_step(number + 1))
        rounds.step = trainer.step
        means = self._sums.means()
        return {"loss": means["loss"]} if "loss" in means else {}

    def _trainer_of(self, split: DataSplit) -> DistillationTrainer:
        """The trainer, made with the first round that is learned, where it reads a checkpoint."""
        session, rounds = self._session, self._rounds
        if self._trainer is None:
            assert session.teacher is not None and isinstance(session.loss, DistillationOptions)
            self._trainer = rounds.trainer = DistillationTrainer(
                session.config,
                session.display,
                setup_of(rounds, split, self._sums.tensors),
                session.teacher,
                session.loss,
                self._sums,
            )
        return self._trainer

    def _rollouts(self, groups: GroupDataset, round_: RoundSamples) -> Rollouts:
        """Lengths and scores of the samples; there are no log-probs to compare with."""
        device = self._session.device
        lengths = torch.from_numpy(groups.response_lengths).long()
        return Rollouts(
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
            old_logps=torch.zeros(int(lengths.sum()), device=device),
            rewards=round_.rewards.flatten().to(device),
        )
