"""The on-policy runs of the PMO study: a reward model of the training pairs, PPO and Nash-MD."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastpref.data.collate import Batch, collate
from fastpref.model.generate import Sampling, until_end
from fastpref.model.policy import Policy
from fastpref.model.reference_policy import FrozenReference
from fastpref.online.learner import LearnerOptions, OnlineLearner, groups_of
from fastpref.online.mixture import sample_mixture
from fastpref.online.nash_md import NashMD, preference_of_rewards
from fastpref.online.ppo import PPO
from fastpref.reproduce import online_tables
from fastpref.reproduce.study import Job, Record
from fastpref.training.optim import learning_rate, make_optimizer
from fastpref.training.trainer import Trainer

PPO_LABEL, NASH_LABEL = LABELS = ("ppo", "nash-md")
OBJECTIVES: dict[str, PPO | NashMD] = {
    PPO_LABEL: PPO(kl_coef=0.1, value_lr=1e-2),
    NASH_LABEL: NashMD(beta=0.1),
}
# Optimizer steps on one round of samples: PPO's ratios allow more than one.
EPOCHS = {PPO_LABEL: 2, NASH_LABEL: 1}
SAMPLES_PER_PROMPT, MAX_NEW_TOKENS, RECORDS = 2, 24, 10
OPTIMA = "on-policy optima"
OPTIMA_METRICS = ("online/ppo", "online/nash-md 0", "online/nash-md 0.5")

Ids = list[int]


def optima(job: Job) -> list[Record]:
    """Divergence, nats, of tables trained by PPO and Nash-MD from their exact optima."""
    distances = online_tables.distances(job.seed)
    values = {f"online/{name}": value for name, value in distances.items()}
    return [{"step": online_tables.STEPS, **values}]


class RewardModel:
    """Reward of a response: a linear map of the last token's hidden state of a trained trunk."""

    def __init__(self, policy: Policy) -> None:
        self.trunk = policy
        self.head = torch.nn.Linear(policy.head()[0].shape[1], 1, device=policy.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.trunk.trainable_parameters().values(), *self.head.parameters()]

    def __call__(self, batch: Batch) -> Tensor:
        """Rewards of the batch's sequences, (S,)."""
        last = batch.label_positions[batch.cu_seqlens[1:] - 1]
        rewards: Tensor = self.head(self.trunk.hidden_states(batch).index_select(0, last).float())
        return rewards.squeeze(1)

    @torch.no_grad()
    def of(self, prompts: list[Ids], responses: list[Ids]) -> Tensor:
        """Rewards of responses, (S,)."""
        groups = groups_of(prompts, responses)
        return self(collate(groups, "pointwise", self.trunk.layout).to(self.trunk.device))


def train_reward_model(trainer: Trainer) -> RewardModel:
    """Fit the probabilities of the training pairs, in the steps that the offline runs take."""
    model = RewardModel(copy.deepcopy(trainer.policy))
    optimizer = make_optimizer(trainer.config.optim, model.parameters())
    for step in range(_steps(trainer)):
        _set_rate(optimizer, trainer, step)
        (batch,) = trainer.policy.batches(trainer.run.train.groups, trainer.plan.groups(step))
        chosen, rejected = model(batch).chunk(2)
        assert batch.targets is not None
        loss = binary_cross_entropy_with_logits(chosen - rejected, batch.targets.to(chosen))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.config.optim.max_grad_norm or 1)
        optimizer.step()
    return model


def learn(trainer: Trainer, job: Job) -> list[Record]:
    """Train the policy of a trainer by PPO or Nash-MD on its own samples of the training prompts.

    As many optimizer steps as the offline runs, each on as many responses.
    """
    reward_model = train_reward_model(trainer)
    reference, objective = copy.deepcopy(trainer.policy), OBJECTIVES[job.label]
    epochs = EPOCHS[job.label]
    options = LearnerOptions(epochs, micro_batch=1024, seed=job.seed)
    learner = OnlineLearner(
        trainer.policy, FrozenReference(reference), objective, trainer.optimizer, options
    )
    generator = torch.Generator(trainer.policy.device).manual_seed(job.seed)
    rounds = -(-_steps(trainer) // epochs)
    records = []
    for number in range(rounds):
        _set_rate(trainer.optimizer, trainer, number * epochs)
        prompts = _prompts(trainer, number)
        responses = _sample(trainer, prompts, number)
        rewards = reward_model.of(prompts, responses)
        scores = rewards
        if isinstance(objective, NashMD):
            opponents = sample_mixture(
                trainer.policy, reference, prompts, _ends(trainer),
                mixture=objective.mixture, max_new_tokens=MAX_NEW_TOKENS,
                batch_size=len(prompts), generator=generator,
            )  # fmt: skip
            scores = preference_of_rewards(rewards, reward_model.of(prompts, opponents))
        metrics = learner.update(prompts, responses, scores)
        if number % -(-rounds // RECORDS) == 0 or number == rounds - 1:
            kept = {"reward": rewards.mean().item(), "kl": metrics["kl"], "loss": metrics["loss"]}
            records.append({"step": number * epochs, **kept})
    return records


def _prompts(trainer: Trainer, step: int) -> list[Ids]:
    """Prompts of the pairs of a step, each as often as it has samples."""
    groups = trainer.run.train.groups
    return [
        groups[index].prompt.tolist()
        for index in trainer.plan.groups(step)
        for _ in range(SAMPLES_PER_PROMPT)
    ]


def _sample(trainer: Trainer, prompts: list[Ids], step: int) -> list[Ids]:
    sampling = Sampling(
        max_new_tokens=MAX_NEW_TOKENS, batch_size=len(prompts),
        seed=1000 * trainer.config.training.seed + step,
    )  # fmt: skip
    ends = _ends(trainer)
    sequences = trainer.policy.generate(prompts, ends, sampling)
    return [until_end(tokens, ends).tolist() for tokens in sequences]


def _ends(trainer: Trainer) -> set[int]:
    end: Any = trainer.run.tokenizer.eos_token_id
    return {end}


def _steps(trainer: Trainer) -> int:
    steps = trainer.steps
    assert steps is not None
    return steps


def _set_rate(optimizer: torch.optim.Optimizer, trainer: Trainer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(trainer.config.optim, step, _steps(trainer))
