"""The end of a run, or of a step, whose loss or gradient is not finite."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from fastpref import distributed, metrics
from fastpref.training.anomalies import MOST_SKIPPED, NonFiniteTracker, SkippedSteps
from fastpref.training.setup import DataSplit
from fastpref.training.step_hook import StepHook
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display


class Diverged(UserError):
    """The loss or the gradient is no longer finite."""


class NonFiniteGuard:
    """Looks for losses and gradients of a window that are not finite, and names their rows.

    folder: gets `nonfinite.json`, with all rows.
    """

    def __init__(
        self,
        window: metrics.Window,
        data: DataSplit,
        device: torch.device,
        folder: Path,
        display: Display,
    ) -> None:
        self.tracker, self.skipped = NonFiniteTracker(), SkippedSteps()
        self._window, self.data, self._device = window, data, device
        self._folder, self._display = folder, display

    def stop_unless_finite(self) -> None:
        """Raise Diverged if a loss or gradient since the last call is not finite."""
        nonfinite = self._window.first_non_finite()
        if nonfinite is not None:
            raise self._diverged(nonfinite, self._rows(nonfinite.step))
        self.tracker.clear()

    def skips(self, hooks: Iterable[StepHook]) -> bool:
        """Discard the step if its loss or gradient is not finite; return whether it was.

        Raises Diverged at the last of MOST_SKIPPED in a row.
        """
        nonfinite = self._window.first_non_finite()
        if nonfinite is None:
            self.tracker.clear()
            return False
        rows = self._rows(nonfinite.step)
        if self.skipped.record(nonfinite.step, rows):
            raise self._diverged(nonfinite, rows, f", after {MOST_SKIPPED - 1} that were skipped")
        for hook in hooks:
            hook.discard_step()
        self.tracker.clear()
        self._window.drop_last()
        self._display.note(
            f"step {nonfinite.step:,} is skipped: {nonfinite.metric} is {nonfinite.value}, "
            f"rows {_some(rows)}"
        )
        return True

    def _rows(self, step: int) -> list[int]:
        """Rows of a step whose loss is not finite; all its rows if only the gradient is not."""
        groups = self.tracker.groups(step, self._device) or self.data.plan.groups(step - 1)
        return self.data.groups.row_names(groups)

    def _diverged(self, nonfinite: metrics.NonFinite, rows: list[int], when: str = "") -> Diverged:
        """Save the row numbers and return the error."""
        step, metric, value = nonfinite
        path = self._folder / "nonfinite.json"
        if distributed.is_main_process():
            report = {"step": step, "metric": metric, "value": str(value), "rows": rows}
            path.write_text(json.dumps(report, indent=1))
        return Diverged(
            f"training stopped: {metric} is {value} at step {step}{when}, rows {_some(rows)} "
            f"(all in {path}); look at them or lower optim.lr"
        )


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
