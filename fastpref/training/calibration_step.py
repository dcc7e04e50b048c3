"""Reward Calibration and the band monitor inside the training loop: the calls of the trainer.

Both need the scores of each pair. `head` takes those of the head's weight from the forward pass
that is made anyway, and costs one or two passes over the head; `last_adapter` and `full` take the
gradients of the log-probs with respect to trained parameters, by a partial backward pass for each
response. On CUDA the scores of the head wait for the offsets of the batch.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fastpref import distributed, losses
from fastpref.config import Config, ConfigError
from fastpref.dynamics.band import band_metrics, band_sums, parameter_geometry
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.logps import TokenLogps
from fastpref.losses import Logps, PairwiseLoss, TokenLevelLoss
from fastpref.model.policy import Policy
from fastpref.training.forward import MicroBatchLogps

State = dict[str, list[float]]


class NoCalibration:
    """That of a run which neither calibrates nor monitors."""

    def wants_geometry(self, step: int) -> bool:
        """Whether the forward passes of a training step must bring the geometry of the head."""
        return False

    def calibrated(self, seen: MicroBatchLogps, step: int) -> Logps:
        """What the objective is applied to: the same log-probs, with other gradients."""
        return seen.policy

    def end_step(self) -> None:
        """Take the pairs of the step, all micro-batches, into the averages."""

    def drop_step(self) -> None:
        """Forget the pairs seen since the last step."""

    def flush(self) -> dict[str, float]:
        """Metrics of the pairs measured since the last call."""
        return {}

    def state(self) -> State:
        """What a checkpoint must hold, as numbers that JSON gives back exactly."""
        return {}

    def restore(self, state: State) -> None:
        """Continue from a result of `state`."""


class CalibrationStep(NoCalibration):
    """Calibrates, if asked to, and measures the band, every `every` steps."""

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
        self._step = torch.zeros(8, dtype=torch.float64, device=device)
        self._window = torch.zeros(8, dtype=torch.float64, device=device)
        bands = torch.zeros(3, 16, dtype=torch.float64, device=device)
        self._band, self._own_band, self._step_band = bands

    def wants_geometry(self, step: int) -> bool:
        return self.parameters is None and self._measures(step)

    def calibrated(self, seen: MicroBatchLogps, step: int) -> Logps:
        policy: Any = seen.policy
        if not (self._measures(step) and torch.is_grad_enabled()):
            return policy
        d_w, d_l, weights = losses.pair_incentives(self.loss, policy, seen.reference)
        geometry = seen.geometry
        if self.parameters is not None:
            sums = policy.sequences(weights) if isinstance(policy, TokenLogps) else policy
            geometry = parameter_geometry(sums, self.parameters)
        assert geometry is not None
        if self.calibration is not None:
            policy, factor, sums = self.calibration.calibrate(policy, (d_w, d_l), geometry)
            d_w, d_l = d_w * factor, d_l / factor
            self._step += sums
        self._step_band += band_sums(d_w, d_l, geometry)
        return policy

    def end_step(self) -> None:
        if self.calibration is not None:
            self.calibration.update(distributed.all_reduce_sum_(self._step))
            self._window += self._step
        self._own_band += self._step_band
        self.drop_step()

    def drop_step(self) -> None:
        self._step.zero_()
        self._step_band.zero_()

    def flush(self) -> dict[str, float]:
        self._take_in_band()
        found = band_metrics(self._band)
        if self.calibration is not None:
            found |= self.calibration.metrics(self._window)
        numbers = zip(found, torch.stack(list(found.values())).tolist(), strict=True)
        self._band.zero_()
        self._window.zero_()
        return {name: value for name, value in numbers if value == value}  # NaN: no pair had it

    def state(self) -> State:
        self._take_in_band()
        averages = [] if self.calibration is None else self.calibration.averages.tolist()
        return {
            "averages": averages,
            "window": self._window.tolist(),
            "band": self._band.tolist(),
        }

    def restore(self, state: State) -> None:
        if not state:  # of a run that neither calibrated nor monitored: begin here
            return
        self._window.copy_(torch.tensor(state["window"], dtype=torch.float64))
        self._band.copy_(torch.tensor(state["band"], dtype=torch.float64))
        if self.calibration is not None and state["averages"]:
            averages = torch.tensor(state["averages"], dtype=torch.float64)
            self.calibration.load_state_dict({"averages": averages})

    def _take_in_band(self) -> None:
        """Add what each rank has measured of its own pairs to what all know."""
        self._band += distributed.all_reduce_sum_(self._own_band)
        self._own_band.zero_()

    def _measures(self, step: int) -> bool:
        return self.calibration is not None or (step + 1) % self.every == 0


def balance(config: Config, loss: object, policy: Policy) -> NoCalibration:
    """What a config asks for. Raises ConfigError where the model has no such scores."""
    rc, monitor = config.calibration, config.monitor
    if rc is None and monitor.band_every is None:
        return NoCalibration()
    assert isinstance(loss, PairwiseLoss | TokenLevelLoss)  # the config has been checked
    if rc is None:
        _check_head(policy, "monitor.band_every", "leave it out")
        return CalibrationStep(loss, None, monitor.band_every or 1, None, policy.device)
    parameters = _parameters(policy, rc.scope)
    calibration = RewardCalibration(rc.momentum, device=policy.device)
    return CalibrationStep(loss, calibration, 1, parameters, policy.device)


def _parameters(policy: Policy, scope: str) -> list[nn.Parameter] | None:
    """The parameters of a scope; None for the head's weight."""
    head = policy.base.get_output_embeddings()
    if scope == "auto":
        scope = "head" if head.weight.requires_grad else "last_adapter"
    if scope == "head":
        _check_head(policy, "calibration.scope", "use last_adapter or full")
        return None
    trained = policy.trainable_parameters()
    if policy.sharded:
        raise ConfigError(
            f"calibration.scope: {scope} takes gradients of its own, which a sharded model does "
            "not give; use head, or set parallel.shard=1"
        )
    if scope == "full":
        return list(trained.values())
    layers = {name: _layer(name) for name in trained}
    last = max(layers.values())
    return [trained[name] for name, layer in layers.items() if layer == last]


def _check_head(policy: Policy, field: str, remedy: str) -> None:
    if policy.base.get_output_embeddings().bias is not None:
        raise ConfigError(
            f"{field}: the head of {type(policy.base).__name__} has a bias, whose scores are not "
            f"measured; {remedy}"
        )


def _layer(name: str) -> int:
    """The number of the layer that a parameter's name holds, -1 if there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1
