"""Reward Calibration and the band monitor as hooks of the training loop.

Both need the scores of each pair. `head` takes the scores of the head's weight from the forward
pass of the step, and costs one or two matmuls of the head; `last_adapter` and `full` take the
gradients of the log-probs with respect to trained parameters, by a partial backward pass for each
response. On CUDA the scores of the head wait for the offsets of the batch.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from fastpref import distributed, losses
from fastpref.config import Calibration, ConfigError, Monitor
from fastpref.dynamics.band import band_metrics, band_sums, parameter_geometry
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.logps import TokenLogps
from fastpref.losses import Logps, Objective, PairwiseLoss, TokenLevelLoss
from fastpref.model.policy import Policy
from fastpref.training.forward import MicroBatchLogps
from fastpref.training.step_hook import StepHook


class NoCalibration(StepHook):
    """No-op: neither calibration nor band monitoring is enabled."""

    def needs_geometry(self, step: int) -> bool:
        """Whether the forward passes of a training step must return the geometry of the head."""
        return False

    def calibrate(self, logps: MicroBatchLogps, step: int) -> Logps:
        """Return the policy's log-probs for the objective: equal values, calibrated gradients."""
        return logps.policy


class CalibrationStep(NoCalibration):
    """Reward Calibration, if there is one, and the band, measured every `every` steps."""

    def __init__(
        self,
        loss: PairwiseLoss | TokenLevelLoss,
        calibration: RewardCalibration | None,
        every: int,
        parameters: list[nn.Parameter] | None,  # whose scores; None: the head's
        device: torch.device,
    ) -> None:
        self.loss, self.calibration, self.every = loss, calibration, every
        self.parameters = parameters
        self._step_sums = torch.zeros(8, dtype=torch.float64, device=device)
        self._window = torch.zeros(8, dtype=torch.float64, device=device)
        bands = torch.zeros(3, 16, dtype=torch.float64, device=device)
        self._band, self._local_band, self._step_band = bands

    def needs_geometry(self, step: int) -> bool:
        return self.parameters is None and self._measures(step)

    def calibrate(self, logps: MicroBatchLogps, step: int) -> Logps:
        policy: Any = logps.policy
        if not self._measures(step):
            return policy
        d_w, d_l, weights = losses.pair_incentives(self.loss, policy, logps.reference)
        geometry = logps.geometry
        if self.parameters is not None:
            sequences = policy.sequences(weights) if isinstance(policy, TokenLogps) else policy
            geometry = parameter_geometry(sequences, self.parameters)
        assert geometry is not None
        if self.calibration is not None:
            policy, factor, sums = self.calibration.calibrate(policy, (d_w, d_l), geometry)
            d_w, d_l = d_w * factor, d_l / factor
            self._step_sums += sums
        self._step_band += band_sums(d_w, d_l, geometry)
        return policy

    def after_step(self) -> None:
        if self.calibration is not None:
            self.calibration.update(distributed.all_reduce_sum_(self._step_sums))
            self._window += self._step_sums
        self._local_band += self._step_band
        self.discard_step()

    def discard_step(self) -> None:
        self._step_sums.zero_()
        self._step_band.zero_()

    def metrics(self) -> dict[str, float]:
        self._all_reduce_band()
        means = band_metrics(self._band)
        if self.calibration is not None:
            means |= self.calibration.metrics(self._window)
        values = zip(means, torch.stack(list(means.values())).tolist(), strict=True)
        self._band.zero_()
        self._window.zero_()
        return {name: value for name, value in values if not math.isnan(value)}  # NaN: no pair

    def state_dict(self) -> dict[str, list[float]]:
        self._all_reduce_band()
        averages = [] if self.calibration is None else self.calibration.averages.tolist()
        return {
            "averages": averages,
            "window": self._window.tolist(),
            "band": self._band.tolist(),
        }

    def load_state_dict(self, state: Any) -> None:
        if not state:  # the run did neither calibrate nor monitor until now
            return
        self._window.copy_(torch.tensor(state["window"], dtype=torch.float64))
        self._band.copy_(torch.tensor(state["band"], dtype=torch.float64))
        if self.calibration is not None and state["averages"]:
            averages = torch.tensor(state["averages"], dtype=torch.float64)
            self.calibration.load_state_dict({"averages": averages})

    def _all_reduce_band(self) -> None:
        """All-reduce the local band statistics into the global window."""
        self._band += distributed.all_reduce_sum_(self._local_band)
        self._local_band.zero_()

    def _measures(self, step: int) -> bool:
        return self.calibration is not None or (step + 1) % self.every == 0


def make_calibration(
    calibration: Calibration | None, monitor: Monitor, loss: Objective, policy: Policy
) -> NoCalibration:
    """Make what a config asks for; raises ConfigError where the model has no such scores."""
    if calibration is None and monitor.band_every is None:
        return NoCalibration()
    assert isinstance(loss, PairwiseLoss | TokenLevelLoss)  # the config has been checked
    if calibration is None:
        _check_head(policy, "monitor.band_every", "leave it out")
        return CalibrationStep(loss, None, monitor.band_every or 1, None, policy.device)
    parameters = _parameters(policy, calibration.scope)
    averages = RewardCalibration(calibration.momentum, device=policy.device)
    return CalibrationStep(loss, averages, 1, parameters, policy.device)


def _parameters(policy: Policy, scope: str) -> list[nn.Parameter] | None:
    """Parameters of a scope; None for the head's weight."""
    head = policy.base.get_output_embeddings()
    if scope == "auto":
        scope = "head" if head.weight.requires_grad else "last_adapter"
    if scope == "head":
        _check_head(policy, "calibration.scope", "use last_adapter or full")
        return None
    trainable = policy.trainable_parameters()
    if policy.sharded:
        raise ConfigError(
            f"calibration.scope: {scope} takes gradients of its own, which a sharded model does "
            "not give; use head, or set parallel.shard=1"
        )
    if scope == "full":
        return list(trainable.values())
    layers = {name: _layer(name) for name in trainable}
    last = max(layers.values())
    return [trainable[name] for name, layer in layers.items() if layer == last]


def _check_head(policy: Policy, field: str, remedy: str) -> None:
    if policy.base.get_output_embeddings().bias is not None:
        raise ConfigError(
            f"{field}: the head of {type(policy.base).__name__} has a bias, whose scores are not "
            f"measured; {remedy}"
        )


def _layer(name: str) -> int:
    """Number of the layer in a parameter's name, -1 without one."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1
