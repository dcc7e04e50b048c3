"""The value head of a run: its steps are those of Adam, and its state can be restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpref.config import Config
from fastpref.online.ppo import ValueHead
from fastpref.online.value_steps import ValueSteps
from tests.helpers.policies import policy_of


def test_steps_are_those_of_adam_and_go_on_after_a_checkpoint(
    make_config: Callable[..., Config], tokenizer: Any
) -> None:
    policy = policy_of(make_config(), tokenizer)
    width = policy.head()[0].shape[1]
    hidden, returns = torch.randn(5, width), torch.randn(5)
    plain = ValueHead(width)
    adam = torch.optim.Adam(plain.parameters(), 0.02)
    steps = ValueSteps(policy, 0.02)
    for number in range(3):
        adam.zero_grad()
        (plain(hidden) - returns).square().sum().backward()
        adam.step()
        steps.before_step(number)
        (steps.head(hidden) - returns).square().sum().backward()
        if number == 1:
            saved = {name: tensor.clone() for name, tensor in steps.tensors.items()}
            steps.discard_step()
            steps.after_step()  # without a gradient nothing moves
            steps = ValueSteps(policy, 0.02)
            for name, tensor in steps.tensors.items():
                tensor.copy_(saved[name])
            (steps.head(hidden) - returns).square().sum().backward()
        steps.after_step()
    assert torch.equal(plain.weight, steps.head.weight)
    assert torch.equal(plain.bias, steps.head.bias)
    assert len(saved) == 8
