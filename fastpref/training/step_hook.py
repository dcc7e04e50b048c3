"""The protocol of everything that observes the steps of a run and keeps state between them."""

from __future__ import annotations

from typing import Any

from fastpref.losses import Output
from fastpref.training.forward import MicroBatchLogps


class StepHook:
    """Observer of optimizer steps; every method of this base class is a no-op.

    The trainer calls `before_step`, then `after_micro_batch` for every micro-batch of this rank,
    then `after_step`, or `discard_step` where the step is skipped.
    """

    def before_step(self, step: int) -> None:
        """Prepare for step `step`, counted from 0."""

    def after_micro_batch(self, groups: list[int], logps: MicroBatchLogps, output: Output) -> None:
        """Record the results of one micro-batch; `groups` are indices into the training data."""

    def after_step(self) -> None:
        """Add what was recorded in this step to the state; all ranks call this."""

    def discard_step(self) -> None:
        """Drop what was recorded in this step."""

    def metrics(self) -> dict[str, Any]:
        """Return the metrics since the last call, for one line of metrics; all ranks call this."""
        return {}

    def state_dict(self) -> Any:
        """Return the state for a checkpoint, in values that JSON restores exactly."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Restore a result of `state_dict`."""
