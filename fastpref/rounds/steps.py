"""Setup of the optimizer steps of a round: its groups in order, their reference, the trainer's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastpref import distributed
from fastpref.data.batch_plan import Plan
from fastpref.rounds.sequence import Rounds
from fastpref.training.setup import DataSplit, DataView, TrainingSetup


def view_of(
    rounds: Rounds, groups: Any, key: str, number: int, kind: str = "reference"
) -> DataView:
    """Groups of a round in the order of its steps, with their reference.

    kind, key: of the file of the reference's log-probs, if these are kept.

    Raises UserError if that file is missing or damaged, and the weights have moved on.
    """
    session, training = rounds.session, rounds.config.training
    plan = Plan.of(
        groups,
        training.batch_size,
        session.memory.micro_batch_tokens,
        training.seed,
        session.policy.layout,
        distributed.world_size(),
        distributed.rank(),
    )
    plan = replace(plan, first_step=rounds.first_step(number))
    files = rounds.files(number)
    if session.reference.keeps_logps() and rounds.has_taken(number):
        files.check_logps(kind, key)
    reference = session.reference.of(groups, plan, files.path(kind, key, ".safetensors"))
    return DataView(groups, plan, reference)


def setup_of(rounds: Rounds, split: DataSplit, tensors: dict[str, Tensor]) -> TrainingSetup:
    """Setup of the trainer of a run that begins, or goes on, with the data of a round.

    tensors: further ones of the checkpoints, by their names in them.
    """
    session = rounds.session
    return TrainingSetup(
        session.tokenizer,
        session.policy,
        session.loss,
        session.memory,
        split,
        folder=session.folder,
        checkpoint=rounds.checkpoint,
        steps=rounds.total_steps,
        further_tensors={**session.reference.tensors, **tensors},
    )
