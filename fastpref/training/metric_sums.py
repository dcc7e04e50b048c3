"""Sums of all metrics of policy and objective over the micro-batches of a rank."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastpref import distributed, metrics
from fastpref.losses import Objective, Output
from fastpref.metrics import preference
from fastpref.training.forward import MicroBatchLogps

NAMES = metrics.PAIR_METRICS + preference.MONITORS
# Of objectives on rollouts.
ROLLOUT_METRICS = ("loss", "reward", "length", "kl", "clip_share", "value_loss")


def metric_names(loss: Objective, sources: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the sums: NAMES, then PAIR_METRICS of each source; of rollouts ROLLOUT_METRICS."""
    return ROLLOUT_METRICS if loss.of_rollouts else NAMES + metrics.names_by_source(sources)


def of_rewards(values: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are about rewards: a reward model has no log-probs."""
    policies = ("logps/", "preference/", "contrast/", "entropy")
    return {name: value for name, value in values.items() if not name.startswith(policies)}


class StepSums(Protocol):
    """Sums of a step over the micro-batches of a rank."""

    sums: Tensor  # (2, M) of the names, and how many values each sums

    def entropy(self) -> float:
        """Mean entropy of the tokens of all ranks, nats."""


class MetricSums:
    """Sums of a step or an evaluation; nothing waits for the device until they are read.

    detailed: also the histogram of contrastive logits and the calibration of preferences, which
        only an evaluation reports.
    sources: names of the sources of the data, each of which gets PAIR_METRICS of its own.
    """

    def __init__(
        self,
        loss: Objective,
        margins: tuple[float, float],
        device: torch.device,
        detailed: bool = False,
        sources: tuple[str, ...] = (),
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._loss, self._margins, self._detailed = loss, margins, detailed
        self._sources, self._names = sources, metric_names(loss, sources)
        self.sums = zeros(2, len(self._names))  # of the names, and how many values each sums
        self._entropy = zeros(2)
        self._contrasts, self._calibration = [zeros(0)], zeros(3, 10)

    def add(self, logps: MicroBatchLogps, output: Output, sources: Tensor | None = None) -> None:
        """Add a micro-batch; `sources` is the number of the source of each of its groups, (G,)."""
        policy, reference = logps.policy, logps.reference
        contrast = preference.contrastive_logits(policy, reference, self._loss.needs_reference)
        monitors = preference.monitor_sums(policy, reference, contrast, self._margins)
        sums = [metrics.sums_and_counts(output, policy), monitors]
        if sources is not None:
            count = len(self._sources)
            sums.append(metrics.sums_by_source(output, policy, sources.to(self.sums.device), count))
        self.sums += torch.cat(sums, 1)
        if logps.entropy is not None:
            self._entropy += logps.entropy
        if self._detailed and contrast is not None:
            self._contrasts.append(contrast.double())
            self._calibration += preference.calibration_sums(policy)

    def entropy(self) -> float:
        """Mean entropy of the tokens of all ranks, nats."""
        return metrics.mean(distributed.all_reduce_sum_(self._entropy))

    def evaluation(self, soft_labels: bool) -> dict[str, Any]:
        """All metrics of all ranks, under names that begin with `eval_`."""
        sums = distributed.all_reduce_sum_(self.sums)
        values: dict[str, Any] = metrics.means(sums, self._names)
        if self._loss.of_rewards:
            return {f"eval_{name}": value for name, value in of_rewards(values).items()}
        values["entropy"] = self.entropy()
        if self._loss.kind == "pairwise":
            contrasts = distributed.gather(torch.cat(self._contrasts))
            values["contrast/histogram"] = preference.histogram(contrasts)
        if soft_labels:
            calibration = preference.calibration(distributed.all_reduce_sum_(self._calibration))
            values["preference/calibration"] = calibration
        return {f"eval_{name}": value for name, value in values.items()}
