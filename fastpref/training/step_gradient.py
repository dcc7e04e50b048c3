"""The direction of a step: the gradient of the loss, or DPO-PG's projected gradient.

Gradients of sharded weights come summed over the ranks out of every backward pass; those of
adapters, which are whole on every rank, are summed here, once per step.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastpref import distributed
from fastpref.dynamics.dpo_pg import exchange, project_
from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.losses import Logps, Output


class Gradient:
    """That of the mean loss over the step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def backward(self, policy: Logps, output: Output, count: float) -> None:
        """Add one micro-batch of a step of `count` pairs, responses or groups to the gradients.

        With a count of infinity it adds nothing, in as many backward passes.
        """
        (output.loss.sum() / count).backward()

    def finish(self) -> None:
        """Make of the step's gradients what the optimizer is given; before clipping."""
        _sum_over_ranks([parameter.grad for parameter in self._parameters])


class Projected(Gradient):
    """That of the mean chosen log-likelihood, without what would raise the rejected one.

    The loss is a metric alone. See `fastpref.dynamics.dpo_pg`.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self._rejected: list[Tensor | None] = [None] * len(parameters)

    def backward(self, policy: Logps, output: Output, count: float) -> None:
        if isinstance(policy, TokenLogps):
            policy = policy.sequences(policy.weights)
        assert isinstance(policy, SequenceLogps)
        (-policy.chosen.sum() / count).backward(retain_graph=True)
        self._rejected = exchange(self._parameters, self._rejected)
        (-policy.rejected.sum() / count).backward()
        self._rejected = exchange(self._parameters, self._rejected)

    def finish(self) -> None:
        super().finish()
        _sum_over_ranks(self._rejected)
        pairs = [
            (p.grad, g)
            for p, g in zip(self._parameters, self._rejected, strict=True)
            if p.grad is not None and g is not None
        ]
        if pairs:
            chosen, rejected = zip(*pairs, strict=True)
            project_(chosen, rejected)
        self._rejected = [None] * len(self._parameters)


def _sum_over_ranks(gradients: list[Tensor | None]) -> None:
    distributed.all_reduce_sum_coalesced_(
        g for g in gradients if g is not None and not isinstance(g, DTensor)
    )
