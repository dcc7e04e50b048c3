"""Sums of everything that is measured of policy and objective, over the micro-batches of a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import distributed, metrics
from fastpref.losses import Output
from fastpref.metrics import preference as monitors
from fastpref.training.forward import MicroBatchLogps

NAMES = metrics.PAIR_METRICS + monitors.MONITORS


class MetricSums:
    """Of a step or of an evaluation; nothing here waits for the device until it is read.

    closely: also what only an evaluation shows, the histogram of contrastive logits and the
        calibration of preferences.
    """

    def __init__(
        self,
        loss: Any,
        margins: tuple[float, float],
        device: torch.device,
        closely: bool = False,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._loss, self._margins, self._closely = loss, margins, closely
        self.sums = zeros(2, len(NAMES))  # of NAMES, and how many each is a sum of
        self._entropy = zeros(2)
        self._contrasts, self._calibration = [zeros(0)], zeros(3, 10)

    def add(self, seen: MicroBatchLogps, output: Output) -> None:
        """Take in a micro-batch."""
        policy, reference = seen.policy, seen.reference
        contrast = monitors.contrastive_logits(policy, reference, self._loss.needs_reference)
        watched = monitors.monitor_sums(policy, reference, contrast, self._margins)
        self.sums += torch.cat([metrics.sums_and_counts(output, policy), watched], 1)
        if seen.entropy is not None:
            self._entropy += seen.entropy
        if self._closely and contrast is not None:
            self._contrasts.append(contrast.double())
            self._calibration += monitors.calibration_sums(policy)

    def entropy(self) -> float:
        """Mean entropy of the tokens of all ranks, nats."""
        return metrics.mean(distributed.all_reduce_sum_(self._entropy))

    def evaluation(self, soft_labels: bool) -> dict[str, Any]:
        """All metrics of all ranks, under names that begin with `eval_`."""
        found: dict[str, Any] = metrics.means(distributed.all_reduce_sum_(self.sums), NAMES)
        found["entropy"] = self.entropy()
        if self._loss.kind == "pairwise":
            contrasts = distributed.gather(torch.cat(self._contrasts))
            found["contrast/histogram"] = monitors.histogram(contrasts)
        if soft_labels:
            calibration = monitors.calibration(distributed.all_reduce_sum_(self._calibration))
            found["preference/calibration"] = calibration
        return {f"eval_{name}": value for name, value in found.items()}
