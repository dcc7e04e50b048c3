"""The learner of preference objectives: optimizer steps on the pairs of a round."""

from __future__ import annotations

from fastpref.data.kto_mismatch import MismatchedGroups
from fastpref.losses.pointwise import KTO
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.pairing import groups_of
from fastpref.rounds.sequence import Round, Rounds
from fastpref.rounds.steps import setup_of, view_of
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import UserError


class PairLearner:
    """Takes the optimizer steps of an objective on the pairs of a round."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds, self._session = rounds, rounds.session

    def learn(self, round_: RoundSamples) -> dict[str, float]:
        """Train on the pairs of a round; one without pairs takes no steps."""
        rounds, number = self._rounds, round_.number
        until = rounds.first_step(number + 1)
        data = rounds.round(number)
        if not data.pairs.rows:
            self._leave_out(data, number, until)
            return {}
        split = self._split(data, number)
        if rounds.trainer is None:
            rounds.trainer = self._trainer(split)
        else:
            rounds.trainer.use(split)
        trainer = rounds.trainer
        trainer.loop(rounds.received, until=until)
        rounds.step = trainer.step
        return {}

    def _leave_out(self, data: Round, number: int, until: int) -> None:
        """Go to the end of a round without pairs."""
        rounds = self._rounds
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in data.pairs.left_out.items())
        if rounds.trainer is None:  # a resumed run; its checkpoint is of the pairs before
            earlier = next((k for k in range(number - 1, 0, -1) if rounds.round(k).pairs.rows), 0)
            if not earlier:
                raise UserError(
                    f"rounds: no prompt of round {number} gives a pair ({reasons}); use another "
                    "scorer, more samples or a higher temperature"
                )
            rounds.trainer = self._trainer(self._split(rounds.round(earlier), earlier))
        if rounds.step < until:
            rounds.display.note(f"round {number} takes no step: no prompt gives a pair ({reasons})")
            rounds.trainer.skip_to(until)
            rounds.step = until

    def _trainer(self, split: DataSplit) -> Trainer:
        session = self._session
        trainer = Trainer(session.config, session.display, setup_of(self._rounds, split, {}))
        trainer.hooks += session.reference.hooks()
        return trainer

    def _split(self, data: Round, number: int) -> DataSplit:
        """Groups of a round, their plan and reference."""
        session, rounds = self._session, self._rounds
        groups = groups_of(
            session.loss.kind,
            session.cache,
            data.samples,
            data.scores,
            data.pairs.rows,
            session.loss.needs_margin,
            str(rounds.files(number).path("pairs", data.key)),
        )
        if not rounds.has_taken(number):
            session.reference.begin()
        view = view_of(rounds, groups, data.key, number)
        mismatched = None
        if isinstance(session.loss, KTO):
            others = MismatchedGroups(groups, session.config.data.max_length)
            mismatched = view_of(rounds, others, data.key, number, "reference-mismatched")
        return DataSplit(groups, view.plan, view.reference, mismatched)
