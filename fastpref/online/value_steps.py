"""Value head of PPO as a part of a run: its optimizer steps, and its state for checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.model.policy import Policy
from fastpref.online.ppo import ValueHead
from fastpref.training.step_hook import StepHook


class ValueSteps(StepHook):
    """Value head on the hidden states of a policy, with an Adam of its own at a constant rate.

    It steps whenever the policy does. Its gradient comes from the backward pass of the loss.
    """

    def __init__(self, policy: Policy, lr: float) -> None:
        weight, _ = policy.head()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.head = ValueHead(weight.shape[1]).to(policy.device, dtype)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr)
        for parameter in self.head.parameters():
            # Adam would make these in its first step, and checkpoints are loaded in place.
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state, not copies, by their names in a checkpoint."""
        tensors = {}
        for name, parameter in self.head.named_parameters():
            tensors[f"value_head.{name}"] = parameter.detach()
            for moment, tensor in self._optimizer.state[parameter].items():
                tensors[f"value_optimizer.{name}.{moment}"] = tensor
        return tensors

    def before_step(self, step: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def after_step(self) -> None:
        self._optimizer.step()

    def discard_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
