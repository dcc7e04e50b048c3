"""On-policy distillation: a student learns a teacher's token distributions on its own samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import TokenGroup
from fastpref.model.policy import Policy
from fastpref.online.learner import Tokens, groups_of
from fastpref.ops.divergence import Kind, linear_divergence


class DistillationLearner:
    """Optimizer steps of a student toward a teacher with the same vocabulary, of any width.

    kind, beta, temperature: as in `fastpref.ops.divergence.linear_divergence`.
    optimizer: of the student's parameters; its learning rate is the caller's business.
    micro_batch: responses in a forward pass.

    Raises ValueError if the vocabularies have different sizes.
    """

    def __init__(
        self,
        student: Policy,
        teacher: Policy,
        optimizer: torch.optim.Optimizer,
        kind: Kind = "reverse",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        micro_batch: int = 16,
        max_grad_norm: float = 1.0,
    ) -> None:
        sizes = [len(policy.head()[0]) for policy in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher: expected the student's vocabulary of {sizes[0]} tokens, got {sizes[1]}; "
                "use two models of one family"
            )
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.optimizer, self.micro_batch = optimizer, micro_batch
        self.max_grad_norm = max_grad_norm
        self._kind, self._beta, self._temperature = kind, beta, temperature
        self._parameters = list(student.trainable_parameters().values())

    def update(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> dict[str, float]:
        """Take one optimizer step on the tokens of the responses, and return its metrics.

        The loss is the mean divergence of their tokens, nats; prompts are not learned. Raises
        ValueError for an empty response, and ArithmeticError where the loss is not finite.
        """
        groups = groups_of(prompts, responses)
        tokens = sum(len(group.responses[0]) for group in groups)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(groups), self.micro_batch):
            part = groups[start : start + self.micro_batch]
            loss = self._loss(part).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        if not (np.isfinite(total) and torch.isfinite(norm)):
            raise ArithmeticError(
                f"distillation: the loss is {total:g} and the gradient norm {norm.item():g}; "
                "lower the learning rate"
            )
        self.optimizer.step()
        return {"loss": total, "grad_norm": norm.item(), "length": tokens / len(groups)}

    def _loss(self, groups: Sequence[TokenGroup]) -> Tensor:
        """Divergence of each response token's distributions, (T,), nats."""
        batch, of_teacher = (
            collate(groups, "pointwise", policy.layout).to(policy.device)
            for policy in (self.student, self.teacher)
        )
        hidden = states(self.student, batch)
        return divergences(
            self.student, hidden, self.teacher, of_teacher, self._kind, self._beta,
            self._temperature,
        )  # fmt: skip


def divergences(
    student: Policy,
    hidden: Tensor,  # (T, D) of the student
    teacher: Policy,
    batch: Batch,
    kind: Kind,
    beta: float,
    temperature: float,
) -> Tensor:  # (T,)
    """Divergence of each label's distributions, nats, with gradient to the student alone.

    batch: the labels of the hidden states, in the layout of the teacher.
    """
    weight, bias = student.head()
    with torch.no_grad():
        teacher_hidden, (teacher_weight, teacher_bias) = states(teacher, batch), teacher.head()
    return linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, kind,
        beta=beta, temperature=temperature, bias=bias, teacher_bias=teacher_bias,
        logit_scale=student.logit_scale, softcap=student.softcap,
        teacher_logit_scale=teacher.logit_scale, teacher_softcap=teacher.softcap,
    )  # fmt: skip


def states(policy: Policy, batch: Batch) -> Tensor:
    """Hidden states (T, D) that predict the labels of a batch."""
    return policy.hidden_states(batch).index_select(0, batch.predictor_positions)
