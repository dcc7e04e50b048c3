"""The gradient of a step: that of the loss, or DPO-PG's projected gradient.

Gradients of sharded weights come summed over the ranks out of every backward pass; those of
replicated weights, such as adapters, are summed here, once per step.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastpref import distributed
from fastpref.dynamics.dpo_pg import exchange, project_
from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.losses import Logps


class Gradient:
    """Gradient of the mean loss over the step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def backward(self, loss: Tensor, policy: Logps, scale: float) -> None:
        """Add one micro-batch to the gradients.

        loss: (), the losses of the micro-batch times `scale`.
        scale: 1 / (pairs, responses or groups of the step), or 0 for a micro-batch that does not
            count, whose backward pass must still run with those of the other ranks.
        """
        loss.backward()

    def finish(self) -> None:
        """Complete the accumulated gradients (all-reduce, project), before they are clipped."""
        _all_reduce([parameter.grad for parameter in self._parameters])

    def discard(self) -> None:
        """Drop the accumulated gradients."""
        for parameter in self._parameters:
            parameter.grad = None


class ProjectedGradient(Gradient):
    """Gradient of the mean chosen log-likelihood without what would raise the rejected one.

    The loss is only a metric. See `fastpref.dynamics.dpo_pg`.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self._rejected: list[Tensor | None] = [None] * len(parameters)

    def backward(self, loss: Tensor, policy: Logps, scale: float) -> None:
        if isinstance(policy, TokenLogps):
            policy = policy.sequences(policy.weights)
        assert isinstance(policy, SequenceLogps)
        (-policy.chosen.sum() * scale).backward(retain_graph=True)
        self._rejected = exchange(self._parameters, self._rejected)
        (-policy.rejected.sum() * scale).backward()
        self._rejected = exchange(self._parameters, self._rejected)

    def discard(self) -> None:
        super().discard()
        self._rejected = [None] * len(self._parameters)

    def finish(self) -> None:
        super().finish()
        _all_reduce(self._rejected)
        pairs = [
            (parameter.grad, rejected)
            for parameter, rejected in zip(self._parameters, self._rejected, strict=True)
            if parameter.grad is not None and rejected is not None
        ]
        if pairs:
            chosen, rejected = zip(*pairs, strict=True)
            project_(chosen, rejected)
        self._rejected = [None] * len(self._parameters)


def _all_reduce(gradients: list[Tensor | None]) -> None:
    """Sum the gradients of replicated weights over the ranks, in one collective."""
    distributed.all_reduce_sum_coalesced_(
        gradient
        for gradient in gradients
        if gradient is not None and not isinstance(gradient, DTensor)
    )
