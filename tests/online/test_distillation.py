"""On-policy distillation of a small model from one of another width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.model.generate import Sampling, until_end
from fastpref.model.policy import Policy
from fastpref.online.distillation import DistillationLearner
from tests.helpers.policies import policy_of

PROMPTS, RESPONSES = [[5, 6, 7], [9]], [[11, 12], [14, 15, 16]]


@pytest.fixture
def models(make_config: Callable[..., Config], tokenizer: Any) -> tuple[Policy, Policy]:
    """Student and teacher."""
    values = {"model_type": "llama", "vocab_size": 384, "hidden_size": 48, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 4, "intermediate_size": 32, "initializer_range": 0.3}
    random = {"init": "random", "config": values, "dtype": "float32"}
    return policy_of(make_config(), tokenizer), policy_of(make_config(model=random), tokenizer)


def test_a_step_is_that_of_the_full_logits(models: tuple[Policy, Policy]) -> None:
    student, teacher = models
    total = torch.zeros(())
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        bases: list[Any] = [student.base, teacher.base]
        logq, logp = (base(input_ids=ids).logits[0, rows].log_softmax(-1) for base in bases)
        total = total + (logq.exp() * (logq - logp.detach())).sum()
    parameters = student.trainable_parameters()
    gradients = torch.autograd.grad(total / 5, parameters.values())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), 1.0)
    learner = DistillationLearner(student, teacher, optimizer, micro_batch=1, max_grad_norm=1e9)
    metrics = learner.update(PROMPTS, RESPONSES)
    assert metrics["loss"] == pytest.approx(total.item() / 5, rel=1e-4)
    assert metrics["length"] == 2.5
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(before[name] - parameter, gradient, rtol=1e-3, atol=1e-5)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_student_comes_nearer_on_its_own_samples(models: tuple[Policy, Policy]) -> None:
    student, teacher = models
    optimizer = torch.optim.AdamW(student.trainable_parameters().values(), 1e-2)
    learner = DistillationLearner(student, teacher, optimizer)
    losses = []
    for step in range(8):
        drawn = student.generate(PROMPTS * 4, set(), Sampling(max_new_tokens=6, seed=step))
        losses.append(learner.update(PROMPTS * 4, [until_end(ids, set()) for ids in drawn])["loss"])
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_another_vocabulary_is_refused(models: tuple[Policy, Policy]) -> None:
    student, teacher = models
    head = teacher.base.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight[:380].detach())
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    with pytest.raises(
        ValueError, match="teacher: expected the student's vocabulary of 384 tokens"
    ):
        DistillationLearner(student, teacher, optimizer)
