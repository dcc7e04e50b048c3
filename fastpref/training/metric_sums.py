"""Sums of all metrics of policy and objective over the micro-batches of a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import distributed, metrics
from fastpref.losses import Objective, Output
from fastpref.metrics import preference
from fastpref.training.forward import MicroBatchLogps

NAMES = metrics.PAIR_METRICS + preference.MONITORS


class MetricSums:
    """Sums of a step or an evaluation; nothing waits for the device until they are read.

    detailed: also the histogram of contrastive logits and the calibration of preferences, which
        only an evaluation reports.
    """

    def __init__(
        self,
        loss: Objective,
        margins: tuple[float, float],
        device: torch.device,
        detailed: bool = False,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._loss, self._margins, self._detailed = loss, margins, detailed
        self.sums = zeros(2, len(NAMES))  # of NAMES, and how many values each sums
        self._entropy = zeros(2)
        self._contrasts, self._calibration = [zeros(0)], zeros(3, 10)

    def add(self, logps: MicroBatchLogps, output: Output) -> None:
        """Add a micro-batch."""
        policy, reference = logps.policy, logps.reference
        contrast = preference.contrastive_logits(policy, reference, self._loss.needs_reference)
        monitors = preference.monitor_sums(policy, reference, contrast, self._margins)
        self.sums += torch.cat([metrics.sums_and_counts(output, policy), monitors], 1)
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
        values: dict[str, Any] = metrics.means(distributed.all_reduce_sum_(self.sums), NAMES)
        values["entropy"] = self.entropy()
        if self._loss.kind == "pairwise":
            contrasts = distributed.gather(torch.cat(self._contrasts))
            values["contrast/histogram"] = preference.histogram(contrasts)
        if soft_labels:
            calibration = preference.calibration(distributed.all_reduce_sum_(self._calibration))
            values["preference/calibration"] = calibration
        return {f"eval_{name}": value for name, value in values.items()}
