"""Reward Calibration and the band monitor as hooks of the training loop.

Both need scores. Those of the head's weight, summed over a batch, come out of the forward pass of
the step (`ops.linear_logps_and_scores`); those of each pair cost one or two passes over the head
more. `last_adapter` and `full` take the gradients of the log-probs with respect to trained
parameters, by two partial backward passes for each micro-batch, or for each pair.

The statistics of a batch are sums over the micro-batches and ranks of an optimizer step. Those of a
step with one micro-batch on each rank are complete before its backward pass, and its own band clips
the factor; otherwise that of the step before does.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref import distributed, losses
from fastpref.config import Calibration, ConfigError, Monitor
from fastpref.dynamics.band import parameter_geometry, parameter_scores
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import BatchStatistics, RewardCalibration, calibrated
from fastpref.logps import TokenLogps
from fastpref.losses import Logps, Objective, PairwiseLoss, TokenLevelLoss
from fastpref.model.policy import NO_SCORES, Policy, ScoreOptions
from fastpref.ops import SKETCH_ROWS, ScoreGeometry
from fastpref.ops.score_sketch import sketch_rows
from fastpref.training.band_monitor import BandMonitor
from fastpref.training.forward import MicroBatchLogps
from fastpref.training.step_hook import StepHook


class NoCalibration(StepHook):
    """No-op: neither calibration nor band monitoring is enabled."""

    def scores(self) -> ScoreOptions:
        """Scores of the head that the forward passes of the current step must return."""
        return NO_SCORES

    def calibrate(self, logps: MicroBatchLogps, is_real: bool, accumulated: bool) -> Logps:
        """Return the policy's log-probs for the objective: equal values, calibrated gradients.

        is_real: whether the results of the micro-batch count. accumulated: whether the step has
            several micro-batches. All ranks call this equally often.
        """
        return logps.policy


class Scope(NamedTuple):
    """Parameters whose scores are measured."""

    parameters: list[nn.Parameter] | None  # None: the head's weight
    sketch_rows: int | None  # of the head's batch scores; None: exact
    shape: tuple[int, ...]  # of the summed scores of both sides


class CalibrationStep(NoCalibration):
    """Measure the bands of a step's batch and of its pairs, and calibrate if there is a method."""

    def __init__(
        self,
        loss: PairwiseLoss | TokenLevelLoss,
        method: RewardCalibration | PairCalibration | None,
        band_every: int | None,  # steps between measurements of all bands
        scope: Scope,
        policy: Policy,
    ) -> None:
        self.loss, self.method, self.scope = loss, method, scope
        self._band_every = band_every
        self._by_batch = self._by_pairs = False  # what this step measures
        momentum = RewardCalibration().momentum if method is None else method.momentum
        self.monitor = BandMonitor(momentum, policy.device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=policy.device)
        # Sums over the pairs of the step: of d_w, d_l and 1; of calibrated d_w and d_l, log A, and
        # whether it was clipped.
        self._incentives, self._applied = zeros(3), zeros(4)
        self._pair_sums = zeros(8)  # of `PairCalibration`
        self._scores: Tensor | None = None
        self._statistics: BatchStatistics | None = None  # of the step, once they are complete
        wide = policy.compute_dtype == torch.float64
        self._score_dtype = torch.float64 if wide else torch.float32
        self._window = zeros(8 if isinstance(method, PairCalibration) else 4)

    def before_step(self, step: int) -> None:
        due = self._band_every is not None and (step + 1) % self._band_every == 0
        self._by_batch = due or isinstance(self.method, RewardCalibration)
        self._by_pairs = due or isinstance(self.method, PairCalibration)

    def scores(self) -> ScoreOptions:
        if self.scope.parameters is not None:
            return NO_SCORES
        return ScoreOptions(self._by_batch, self.scope.sketch_rows, self._by_pairs)

    def calibrate(self, logps: MicroBatchLogps, is_real: bool, accumulated: bool) -> Logps:
        policy: Any = logps.policy
        if not self._by_batch and not self._by_pairs:
            return policy
        if is_real:
            incentives = losses.pair_incentives(self.loss, policy, logps.reference)
            d_w, d_l = (d.detach().double() for d in incentives[:2])
            scores, geometry = self._scores_of(logps, incentives[2])
            if scores is not None:
                self._incentives += torch.stack([d_w.sum(), d_l.sum(), d_w.new_tensor(len(d_w))])
                self._scores = scores if self._scores is None else self._scores.add_(scores)
        if isinstance(self.method, RewardCalibration) and not accumulated:
            self._complete()
        if not is_real:
            return policy
        log_factor = clipped = torch.zeros_like(d_w)
        if isinstance(self.method, RewardCalibration):
            factor, (log_factor, clipped) = self.method.factor(self._statistics)
            policy = calibrated(policy, factor)
            d_w, d_l = d_w * factor, d_l / factor
        elif self.method is not None:
            assert geometry is not None
            policy, factor, pair_sums = self.method.calibrate(policy, (d_w, d_l), geometry)
            self._pair_sums += pair_sums
            d_w, d_l = d_w * factor, d_l / factor
        columns = torch.broadcast_tensors(d_w, d_l, log_factor, clipped)
        self._applied += torch.stack(columns).sum(1)
        if self._by_pairs:
            assert geometry is not None
            self.monitor.add_pairs(d_w, d_l, geometry)
        return policy

    def after_step(self) -> None:
        if self._by_batch:
            self._end_batch()
        if isinstance(self.method, PairCalibration):
            self.method.update(distributed.all_reduce_sum_(self._pair_sums))
            self._window += self._pair_sums
        self.monitor.end_step()
        self.discard_step()

    def discard_step(self) -> None:
        for sums in (self._incentives, self._applied, self._pair_sums):
            sums.zero_()
        self._scores = self._statistics = None
        self.monitor.discard_step()

    def metrics(self) -> dict[str, float]:
        means = self.monitor.metrics()
        if self.method is not None:
            means |= self.method.metrics(self._window)
        values = zip(means, torch.stack(list(means.values())).tolist(), strict=True)
        self._window.zero_()
        return {name: value for name, value in values if not math.isnan(value)}  # NaN: no value

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"window": self._window.tolist(), "band": self.monitor.state_dict()}
        if self.method is not None:
            state["method"] = type(self.method).__name__
            state["averages"] = {k: v.tolist() for k, v in self.method.state_dict().items()}
        return state

    def load_state_dict(self, state: Any) -> None:
        if not state:  # the run did neither calibrate nor monitor until now
            return
        earlier = state.get("method")
        if self.method is not None and earlier is not None:
            if earlier != type(self.method).__name__:
                raise ConfigError(
                    "resume: the averages in the checkpoint are those of another "
                    "calibration.statistics; restore it or choose another training.output_dir"
                )
            self._window.copy_(torch.tensor(state["window"], dtype=torch.float64))
            averages = {
                k: torch.tensor(v, dtype=torch.float64) for k, v in state["averages"].items()
            }
            self.method.load_state_dict(averages)
        self.monitor.load_state_dict(state["band"])

    def _scores_of(
        self, logps: MicroBatchLogps, weights: Tensor | None
    ) -> tuple[Tensor | None, ScoreGeometry | None]:
        """Summed scores of the micro-batch and the geometry of its pairs, as far as measured."""
        parameters = self.scope.parameters
        if parameters is None:
            return logps.score_sums, logps.geometry
        policy: Any = logps.policy
        sequences = policy.sequences(weights) if isinstance(policy, TokenLogps) else policy
        scores = parameter_scores(sequences, parameters) if self._by_batch else None
        geometry = parameter_geometry(sequences, parameters) if self._by_pairs else None
        return scores, geometry

    def _complete(self) -> None:
        """Reduce the sums of the step over all ranks to its statistics."""
        scores = self._scores
        if scores is None:  # this rank had no pair
            scores = self._incentives.new_zeros(self.scope.shape, dtype=self._score_dtype)
        distributed.all_reduce_sum_(self._incentives)
        distributed.all_reduce_sum_(scores)
        self._statistics = BatchStatistics.of_sums(self._incentives, scores)

    def _end_batch(self) -> None:
        """Measure the band of the step, and update the averages."""
        if self._statistics is None:
            self._complete()
        assert self._statistics is not None
        pairs = self._incentives[2]
        d_w, d_l, log_factor, clipped = distributed.all_reduce_sum_(self._applied) / pairs
        self.monitor.add_batch(d_w, d_l, self._statistics.geometry)
        if isinstance(self.method, RewardCalibration):
            left_out = self.method.update(self._statistics)
            step = torch.stack([torch.ones_like(d_w), left_out.double(), log_factor, clipped])
            self._window += step


def make_calibration(
    calibration: Calibration | None, monitor: Monitor, loss: Objective, policy: Policy
) -> NoCalibration:
    """Make what a config asks for; raises ConfigError where the model has no such scores."""
    if calibration is None and monitor.band_every is None:
        return NoCalibration()
    assert isinstance(loss, PairwiseLoss | TokenLevelLoss)  # the config has been checked
    if calibration is None:
        _check_head(policy, "monitor.band_every", "leave it out")
        scope = _head_scope(policy, SKETCH_ROWS)
        return CalibrationStep(loss, None, monitor.band_every, scope, policy)
    kind = RewardCalibration if calibration.statistics == "batch" else PairCalibration
    method = kind(calibration.momentum, device=policy.device)
    scope = _scope(policy, calibration)
    return CalibrationStep(loss, method, monitor.band_every, scope, policy)


def _head_scope(policy: Policy, rows: int | None) -> Scope:
    vocabulary, width = policy.base.get_output_embeddings().weight.shape
    return Scope(None, rows, (2, sketch_rows(vocabulary, rows), width))


def _scope(policy: Policy, calibration: Calibration) -> Scope:
    """Parameters of the config's scope."""
    head, scope = policy.base.get_output_embeddings(), calibration.scope
    if scope == "auto":
        scope = "head" if head.weight.requires_grad else "last_adapter"
    if scope == "head":
        _check_head(policy, "calibration.scope", "use last_adapter or full")
        return _head_scope(policy, calibration.sketch_rows)
    trainable = policy.trainable_parameters()
    if policy.sharded:
        raise ConfigError(
            f"calibration.scope: {scope} takes gradients of its own, which a sharded model does "
            "not give; use head, or set parallel.shard=1"
        )
    parameters = list(trainable.values())
    if scope == "last_adapter":
        layers = {name: _layer(name) for name in trainable}
        last = max(layers.values())
        parameters = [trainable[name] for name, layer in layers.items() if layer == last]
    return Scope(parameters, None, (2, sum(p.numel() for p in parameters)))


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
