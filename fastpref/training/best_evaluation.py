"""The best evaluation of a run: whose checkpoint to keep and export, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref import distributed
from fastpref.config import ConfigError
from fastpref.config.evaluation import Evaluation
from fastpref.model.policy import Policy
from fastpref.training import checkpoint, checkpoint_files
from fastpref.training.checkpoint_files import CheckpointError


class BestEvaluation:
    """Step and value of the best evaluation so far; a checkpoint has them, see `state_dict`.

    All ranks add the same values, which are sums over the ranks, so all decide the same.
    """

    def __init__(self, options: Evaluation) -> None:
        self._options = options
        self.step: int | None = None
        self.value = math.nan
        self._counted = math.nan  # value that was better by more than the threshold
        self._evaluations_since = 0

    def add(self, step: int, record: dict[str, Any]) -> None:
        """Compare the metrics of an evaluation, under names that begin with `eval_`.

        The evaluation before the first step is not compared. Raises ConfigError if the metric is
        not among them.
        """
        metric = self._options.metric
        if metric is None:
            return
        value = record.get(f"eval_{metric}")
        if not isinstance(value, int | float):
            names = [
                name[5:] for name, v in record.items() if name[:5] == "eval_" and _is_number(v)
            ]
            raise ConfigError(
                f"evaluation.metric_for_best_model: the evaluations have no {metric}; use one of "
                f"{', '.join(names)}"
            )
        if step == 0:
            return
        if self._is_better(value, self.value):
            self.step, self.value = step, float(value)
        self._evaluations_since += 1
        if self._is_better(value, self._counted, self._options.early_stopping_threshold):
            self._counted, self._evaluations_since = float(value), 0

    def is_at(self, step: int) -> bool:
        """Whether the best evaluation is that of a step, whose checkpoint is to be kept."""
        return self._options.keeps_best and self.step == step

    @property
    def stops(self) -> bool:
        """Whether the run ends early."""
        patience = self._options.early_stopping_patience
        return patience is not None and self._evaluations_since >= patience

    def restore(self, run: Path, policy: Policy, step: int) -> int:
        """Load the best weights if the config asks for them; return the step of the weights.

        run: run directory, whose checkpoints are complete.
        step: last step, whose weights the policy has. A collective call.

        Raises CheckpointError if the checkpoint of the best evaluation is missing or damaged.
        """
        if not self._options.load_best_model_at_end or self.step in (None, step):
            return step
        distributed.barrier()
        folder = run / "checkpoints" / f"step-{self.step}"
        problem = checkpoint_files.damage(folder) if folder.is_dir() else "is missing"
        if problem is not None:
            raise CheckpointError(
                f"evaluation.load_best_model_at_end: {folder}: {problem}; set it to false and "
                "resume=auto to export the last weights"
            )
        checkpoint.restore_weights(folder, policy, "evaluation.load_best_model_at_end")
        assert self.step is not None
        return self.step

    def summary(self, step: int, steps: int, exported: int) -> Iterator[str]:
        """Sentences at the end of a run about an early stop and the best evaluation.

        step: last step of the run, of at most `steps`.
        exported: step of the exported weights.
        """
        metric = f"eval_{self._options.metric}"
        if step < steps:
            count = self._evaluations_since
            last = "the last evaluation" if count == 1 else f"the last {count} evaluations"
            yield (
                f"stopped early after step {step:,} of {steps:,}: {metric} was not better than "
                f"{self._counted:.4g} in {last}"
            )
        if self.step is not None:
            yield (
                f"best evaluation: step {self.step:,}, {metric} {self.value:.4g}; the exported "
                f"weights are those of step {exported:,}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Values in JSON; NaN is null there."""
        return {
            "rule": self._rule,
            "step": self.step,
            "value": _or_none(self.value),
            "counted": _or_none(self._counted),
            "evaluations_since": self._evaluations_since,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint, unless it is of another metric or of an earlier version."""
        if state is None or state["rule"] != self._rule:
            return
        self.step, self._evaluations_since = state["step"], state["evaluations_since"]
        self.value = math.nan if state["value"] is None else state["value"]
        self._counted = math.nan if state["counted"] is None else state["counted"]

    @property
    def _rule(self) -> list[Any]:
        return [self._options.metric, self._options.is_higher_better]

    def _is_better(self, value: float, than: float, threshold: float = 0.0) -> bool:
        if math.isnan(value):
            return False
        if math.isnan(than):
            return True
        gain = value - than if self._options.is_higher_better else than - value
        return gain > threshold


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
