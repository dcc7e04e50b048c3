"""Base of the learners that train on all samples of a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from fastpref.online.rollouts import Rollouts
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.pairing import groups_of_all
from fastpref.rounds.rollout_sums import RoundSums
from fastpref.rounds.sample_trainer import SampleTrainer
from fastpref.rounds.sequence import Rounds
from fastpref.rounds.steps import view_of
from fastpref.training.setup import DataSplit

T = TypeVar("T", bound=SampleTrainer)


class SampleLearner(ABC, Generic[T]):
    """Takes the optimizer steps of a round; a subclass makes the trainer and the rollouts."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds, self._session = rounds, rounds.session
        self._sums = RoundSums(rounds.session.steps_per_round, rounds.session.device)
        self._trainer: T | None = None

    def learn(self, round_: RoundSamples) -> dict[str, float]:
        """Train on all samples of a round; its metrics are means over its steps and samples."""
        rounds, session, number = self._rounds, self._session, round_.number
        data = rounds.round(number)
        source = str(rounds.files(number).path("scores", data.key))
        groups = groups_of_all(session.cache, data.samples, data.scores, source)
        if not rounds.has_taken(number):
            session.reference.begin()
        view = view_of(rounds, groups, data.key, number)
        split = DataSplit(groups, view.plan, view.reference)
        if self._trainer is None:  # it reads the checkpoint, before the policy runs
            self._trainer = rounds.trainer = self.make_trainer(split)
            self._trainer.hooks += session.reference.hooks()
        trainer = self._trainer
        trainer.take(split, self.rollouts(split, data.key, round_))
        trainer.loop(rounds.received, until=rounds.first_step(number + 1))
        rounds.step = trainer.step
        return self.metrics(trainer.rollouts)

    @abstractmethod
    def make_trainer(self, split: DataSplit) -> T:
        """The trainer of the run, with the data of the first round that is learned."""

    @abstractmethod
    def rollouts(self, split: DataSplit, key: str, round_: RoundSamples) -> Rollouts:
        """Rollouts of a round, prepared. key: of files of what the round takes from its start."""

    @abstractmethod
    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Metrics of a round, the same whether it was interrupted or not."""
