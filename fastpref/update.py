"""The direction of a step: the gradient of the loss, or DPO-PG's projected gradient."""

from __future__ import annotations

from torch import Tensor, nn

from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.losses import Logps, Output
from fastpref.projection import exchange, project_


class Gradient:
    """That of the mean loss over the step."""

    def backward(self, policy: Logps, output: Output, count: int) -> None:
        """Add one micro-batch of a step of `count` pairs, responses or groups to the gradients."""
        (output.loss.sum() / count).backward()

    def finish(self) -> None:
        """Make of the step's gradients what the optimizer is given; before clipping."""


class Projected(Gradient):
    """That of the mean chosen log-likelihood, without what would raise the rejected one.

    The loss is a metric alone. See `fastpref.projection`.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._rejected: list[Tensor | None] = [None] * len(parameters)

    def backward(self, policy: Logps, output: Output, count: int) -> None:
        if isinstance(policy, TokenLogps):
            policy = policy.sequences(policy.weights)
        assert isinstance(policy, SequenceLogps)
        (-policy.chosen.sum() / count).backward(retain_graph=True)
        self._rejected = exchange(self._parameters, self._rejected)
        (-policy.rejected.sum() / count).backward()
        self._rejected = exchange(self._parameters, self._rejected)

    def finish(self) -> None:
        pairs = [
            (p.grad, g)
            for p, g in zip(self._parameters, self._rejected, strict=True)
            if p.grad is not None and g is not None
        ]
        if pairs:
            chosen, rejected = zip(*pairs, strict=True)
            project_(chosen, rejected)
        self._rejected = [None] * len(self._parameters)
