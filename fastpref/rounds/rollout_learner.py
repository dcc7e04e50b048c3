"""The learner of objectives on rollouts: optimizer steps on all samples of a round."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.data.collate import Batch
from fastpref.data.streaming import in_memory
from fastpref.logps import segment_offsets
from fastpref.model.policy import ForwardOptions
from fastpref.model.reference_policy import token_indices
from fastpref.online.objectives import objective_of
from fastpref.online.ppo import PPO
from fastpref.online.rollouts import Rollouts
from fastpref.online.value_steps import ValueSteps
from fastpref.rounds.learner import RoundSamples
from fastpref.rounds.rollout_trainer import RolloutTrainer
from fastpref.rounds.sample_learner import SampleLearner
from fastpref.rounds.sequence import Rounds
from fastpref.rounds.steps import setup_of
from fastpref.training.setup import DataSplit

_KIND = "rollouts"  # name of the file


class RolloutLearner(SampleLearner[RolloutTrainer]):
    """Takes the optimizer steps of PPO, GRPO or Nash-MD on the samples of a round.

    The log-probs and values at the start of a round are in a file, from which a run that was killed
    within the round goes on.
    """

    def __init__(self, rounds: Rounds) -> None:
        super().__init__(rounds)
        self._objective = objective_of(rounds.session.loss)
        self._value: ValueSteps | None = None
        if isinstance(self._objective, PPO):
            self._value = ValueSteps(rounds.session.policy, self._objective.value_lr)

    def make_trainer(self, split: DataSplit) -> RolloutTrainer:
        session, value = self._session, self._value
        tensors = {**self._sums.tensors, **({} if value is None else value.tensors)}
        return RolloutTrainer(
            session.config,
            session.display,
            setup_of(self._rounds, split, tensors),
            self._objective,
            value,
            self._sums,
            follows=session.rounds.reference_mode in ("every", "ema"),
        )

    def rollouts(self, split: DataSplit, key: str, round_: RoundSamples) -> Rollouts:
        """Rollouts with what the policy and the reference were at the start of the round."""
        files, device = self._rounds.files(round_.number), self._session.device
        columns = files.read_tensors(_KIND, key)
        if columns is None:
            if self._rounds.has_taken(round_.number):
                files.check_is_there(_KIND, key, ".safetensors")
            columns = self._collect(split)
            files.write_tensors(_KIND, key, columns)
        groups = in_memory(split.groups)
        lengths = torch.from_numpy(groups.response_lengths).long()
        rollouts = Rollouts(
            segment_offsets(lengths).to(device),
            rewards=round_.rewards.flatten().to(device),
            cu_groups=torch.from_numpy(groups.offsets).to(device),
            **{name: column.to(device) for name, column in columns.items()},
        )
        return self._objective.prepare(rollouts)

    @torch.no_grad()
    def _collect(self, split: DataSplit) -> dict[str, Tensor]:
        """Log-probs of the tokens under policy and reference, and their values, (T,) each."""
        session, policy, value = self._session, self._session.policy, self._value
        groups = in_memory(split.groups)
        lengths = torch.from_numpy(groups.response_lengths).long()
        starts = (lengths.cumsum(0) - lengths).to(session.device)
        columns: dict[str, Tensor] = {}

        def put(name: str, batch: Batch, values: Tensor) -> None:
            column = columns.setdefault(name, values.new_zeros(int(lengths.sum())))
            column[token_indices(batch, starts)] = values

        session.display.phase(_KIND, len(groups))
        was_training, done = policy.training, 0
        policy.eval()
        for indices in (part for step in split.plan.coverage() for part in split.plan.parts(step)):
            for batch in policy.batches(groups, indices):
                output = policy(batch, ForwardOptions(head=value is not None))
                put("old_logps", batch, output.token_logps)
                if value is not None:
                    put("values", batch, value.head(output.head[0]))
                reference = split.reference(batch)
                if reference is not None:
                    put("ref_logps", batch, reference.token_logps)
            done += len(indices)
            session.display.advance(done)
            self._rounds.check_signals()
        policy.train(was_training)
        return columns

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        means = self._sums.means()
        names = ("loss", "clip_share", "value_loss")
        values: dict[str, float] = {name: means[name] for name in names if name in means}
        if rollouts.ref_logps is not None:
            values["kl"] = rollouts.sums(rollouts.log_ratios()).double().mean().item()
        if rollouts.values is not None and rollouts.returns is not None:
            error, spread = (rollouts.returns - rollouts.values).var(), rollouts.returns.var()
            if spread > 0:
                values["value_explained"] = 1 - (error / spread).item()
        return values
