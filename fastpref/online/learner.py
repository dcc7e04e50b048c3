"""Optimizer steps of an online objective on responses that the policy has sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastpref import distributed
from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import TokenGroup
from fastpref.logps import segment_offsets
from fastpref.model.policy import ForwardOptions, Policy
from fastpref.model.reference_policy import Reference
from fastpref.online.ppo import PPO, ValueHead
from fastpref.online.rollouts import OnlineObjective, Rollouts
from fastpref.online.value_steps import ValueSteps

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class LearnerOptions:
    """Passes over the samples of a round.

    epochs: passes over all of them; an objective without ratios, such as Nash-MD, is exact with one
        epoch of one minibatch.
    minibatches: optimizer steps in an epoch, each on an equal share of the responses.
    micro_batch: responses in a forward pass.
    """

    epochs: int = 1
    minibatches: int = 1
    micro_batch: int = 16
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")


class _Scores(NamedTuple):
    """Outputs of a forward pass for T response tokens."""

    logps: Tensor  # (T,)
    values: Tensor | None  # (T,)


class OnlineLearner:
    """Learner of one objective: samples with rewards in, a changed policy and metrics out.

    reference: as in `fastpref.model.reference_policy`, run on each round's samples.
    optimizer: of the policy's parameters; its learning rate is the caller's business.

    Raises ValueError in a run of several processes.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        objective: OnlineObjective,
        optimizer: torch.optim.Optimizer,
        options: LearnerOptions = LearnerOptions(),
    ) -> None:
        if distributed.world_size() > 1:
            raise ValueError(
                "objective: online objectives train in one process, "
                f"got {distributed.world_size()}; start one"
            )
        self.policy, self.reference, self.objective = policy, reference, objective
        self.optimizer, self.options = optimizer, options
        self.parameters = list(policy.trainable_parameters().values())
        self.generator = torch.Generator().manual_seed(options.seed)
        self.value: ValueSteps | None = None
        if isinstance(objective, PPO):
            self.value = ValueSteps(policy, objective.value_lr)

    @property
    def value_head(self) -> ValueHead | None:
        """PPO's head of the values."""
        return None if self.value is None else self.value.head

    def update(
        self,
        prompts: Sequence[Tokens],
        responses: Sequence[Tokens],
        rewards: Tensor,  # (S,)
        cu_groups: Tensor | None = None,  # (G + 1,)
    ) -> dict[str, float]:
        """Learn from S responses, each with its prompt, and return the metrics of the round.

        `kl` is the mean of log π(y) − log π_ref(y) over the samples, nats per response. Raises
        ValueError for an empty response, and ArithmeticError, before the weights change, where a
        loss or a gradient is not finite.
        """
        groups = groups_of(prompts, responses)
        rollouts = self.objective.prepare(self._rollouts(groups, rewards, cu_groups))
        steps = [self._step(groups, rollouts, chosen) for chosen in self._minibatches(len(groups))]
        losses, norms = zip(*steps, strict=True)
        record = {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "reward": rollouts.rewards.mean().item(),
            "length": rollouts.lengths.double().mean().item(),
        }
        if rollouts.ref_logps is not None:
            record["kl"] = rollouts.sums(rollouts.log_ratios()).mean().item()
        return record

    @torch.no_grad()
    def _rollouts(
        self, groups: list[TokenGroup], rewards: Tensor, cu_groups: Tensor | None
    ) -> Rollouts:
        """Log-probs and values of the samples before the first step of the round."""
        columns: dict[str, list[Tensor]] = {"old_logps": [], "ref_logps": [], "values": []}
        for batch in self._batches(groups):
            scores, reference = self._forward(batch), self.reference(batch)
            columns["old_logps"].append(scores.logps)
            if reference is not None:
                columns["ref_logps"].append(reference.token_logps)
            if scores.values is not None:
                columns["values"].append(scores.values)
        joined = {name: torch.cat(parts) for name, parts in columns.items() if parts}
        lengths = torch.tensor([len(group.responses[0]) for group in groups])
        device = self.policy.device
        return Rollouts(
            segment_offsets(lengths).to(device),
            rewards=rewards.to(device, joined["old_logps"].dtype),
            cu_groups=None if cu_groups is None else cu_groups.to(device),
            **joined,
        )

    def _step(
        self, groups: list[TokenGroup], rollouts: Rollouts, chosen: list[int]
    ) -> tuple[float, float]:
        """Take one optimizer step on the chosen responses; return its loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.value is not None:
            self.value.discard_step()  # the gradient of the step before
        divisor = self.objective.divisor(rollouts.lengths[chosen])
        total = 0.0
        for start in range(0, len(chosen), self.options.micro_batch):
            part = chosen[start : start + self.options.micro_batch]
            scores = self._forward(self._batch([groups[k] for k in part]))
            loss = self.objective.loss(scores.logps, rollouts.select(part), scores.values)
            loss = loss.sum() / divisor
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        if not (np.isfinite(total) and torch.isfinite(norm)):
            raise ArithmeticError(
                f"objective: the loss is {total:g} and the gradient norm {norm.item():g}; look at "
                "the rewards, or lower the learning rate"
            )
        self.optimizer.step()
        if self.value is not None:
            self.value.after_step()
        return total, norm.item()

    def _forward(self, batch: Batch) -> _Scores:
        output = self.policy(batch, ForwardOptions(head=self.value_head is not None))
        if self.value_head is None:
            return _Scores(output.token_logps, None)
        assert output.head is not None
        return _Scores(output.token_logps, self.value_head(output.head[0].detach()))

    def _batches(self, groups: Sequence[TokenGroup]) -> Iterator[Batch]:
        for start in range(0, len(groups), self.options.micro_batch):
            yield self._batch(groups[start : start + self.options.micro_batch])

    def _batch(self, groups: Sequence[TokenGroup]) -> Batch:
        return collate(groups, "pointwise", self.policy.layout).to(self.policy.device)

    def _minibatches(self, count: int) -> Iterator[list[int]]:
        """Indices of the responses of each optimizer step, in an order of their own each epoch."""
        sizes = np.linspace(0, count, min(self.options.minibatches, count) + 1).round().astype(int)
        for _ in range(self.options.epochs):
            order = torch.randperm(count, generator=self.generator).tolist()
            for start, end in pairwise(sizes.tolist()):
                yield order[start:end]


def groups_of(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[TokenGroup]:
    """A group of each response, with its prompt; ValueError for an empty response."""
    groups = [
        TokenGroup(k, k + 1, np.asarray(prompt, np.int32), (np.asarray(response, np.int32),))
        for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    empty = [group.row for group in groups if not len(group.responses[0])]
    if empty:
        raise ValueError(f"responses: expected tokens in each, got none in response {empty[0]}")
    return groups
