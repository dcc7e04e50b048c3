"""The learner of preference objectives: optimizer steps on the pairs of a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpref.data.batch_plan import Plan
from fastpref.data.kto_mismatch import MismatchedGroups
from fastpref.losses.pointwise import KTO
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.pairing import groups_of
from fastpref.rounds.sequence import Round, Rounds
from fastpref.training.setup import DataSplit, DataView, TrainingSetup
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
        session, rounds = self._session, self._rounds
        reference = session.reference
        setup = TrainingSetup(
            session.tokenizer,
            session.policy,
            session.loss,
            session.memory,
            split,
            folder=session.folder,
            checkpoint=rounds.checkpoint,
            steps=rounds.total_steps,
            reference_tensors=reference.tensors,
        )
        trainer = Trainer(session.config, session.display, setup)
        trainer.hooks += reference.hooks()
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
        is_new = not rounds.has_taken(number)
        if is_new:
            session.reference.begin()
        view = self._view(groups, data.key, number, "reference", is_new)
        mismatched = None
        if isinstance(session.loss, KTO):
            others = MismatchedGroups(groups, session.config.data.max_length)
            mismatched = self._view(others, data.key, number, "reference-mismatched", is_new)
        return DataSplit(groups, view.plan, view.reference, mismatched)

    def _view(self, groups: Any, key: str, number: int, kind: str, is_new: bool) -> DataView:
        session, training = self._session, self._session.config.training
        plan = Plan.of(
            groups,
            training.batch_size,
            session.memory.micro_batch_tokens,
            training.seed,
            session.policy.layout,
        )
        plan = replace(plan, first_step=self._rounds.first_step(number))
        files = self._rounds.files(number)
        if session.reference.keeps_logps() and not is_new:
            files.check_is_there(kind, key, ".safetensors")
        reference = session.reference.of(groups, plan, files.path(kind, key, ".safetensors"))
        return DataView(groups, plan, reference)
