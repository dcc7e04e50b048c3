"""The training loop: plan → forward → objective → backward → clip → step → metrics.

    loss of a step = sum of the losses of its pairs, responses or groups / their number

is the only normalization, so micro-batches and accumulation do not change the result.
"""

from __future__ import annotations

import gc
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpref import distributed, losses, metrics
from fastpref.config import Config
from fastpref.data.streaming import in_memory
from fastpref.model import fsdp
from fastpref.model.batch_layout import check_after_training
from fastpref.training import (
    base_weights,
    checkpoint,
    checkpoint_files,
    rank_checks,
    run_config,
    run_folder,
    run_lock,
    signals,
)
from fastpref.training.anomalies import SpikeDetector
from fastpref.training.best_evaluation import BestEvaluation
from fastpref.training.calibration_step import make_calibration
from fastpref.training.clock import Clock
from fastpref.training.exports import Exporter
from fastpref.training.forward import Forward
from fastpref.training.metric_sums import MetricSums, StepSums, metric_names, of_rewards
from fastpref.training.nonfinite import NonFiniteGuard
from fastpref.training.optim import learning_rate, make_optimizer, warmup_advice
from fastpref.training.profiler import Profiler, part, profiling
from fastpref.training.reference_point import make_reference_point
from fastpref.training.samples import Samples
from fastpref.training.setup import DataSplit, TrainingSetup, prepare
from fastpref.training.step_gradient import Gradient, ProjectedGradient
from fastpref.training.step_hook import StepHook
from fastpref.utils import progress
from fastpref.utils.errors import UserError
from fastpref.utils.garbage import manual_collection


def train(
    config: Config,
    display: progress.Display,
    profile: bool = False,
    received: list[int] | None = None,
) -> Path:
    """Run a config to its end and return the folder of the exported model.

    profile: write where the time of a step goes.
    received: gets the first signal, if one arrives during the steps; the last step ignores it.
    Raises UserError in one line, and Interrupted after SIGTERM or Ctrl-C.
    """
    rank_checks.check_same_config([config])
    with run_lock.hold(Path(config.training.output_dir)):
        trainer = Trainer(config, display, prepare(config, display, takes_first_step=True))
        writes_profile = profile and distributed.is_main_process()
        folder = trainer.run.folder / "profile" if writes_profile else None
        try:
            with signals.collecting(received) as signums, profiling(folder) as trainer.profiler:
                trainer.loop(signums)
        except UserError:
            trainer.close()  # the process may go on with another run
            raise
        if folder is not None:
            display.note(f"profile: {folder}\n{(folder / 'table.txt').read_text()}")
        return trainer.export()


class Trainer:
    """One run: the policy, its data and reference, the optimizer, and the position in the plan."""

    def __init__(
        self, config: Config, display: progress.Display, run: TrainingSetup | None = None
    ) -> None:
        self.config, self.display = config, display
        self.run = prepare(config, display) if run is None else run
        self.policy, self.plan, self.loss = self.run.policy, self.run.train.plan, self.run.loss
        self.parameters = list(self.policy.trainable_parameters().values())
        self.forward = Forward(self.loss, self.policy)
        gradient = ProjectedGradient if config.update == "dpo_pg" else Gradient
        self.gradient = gradient(self.parameters)
        self.reference_point = make_reference_point(self.loss, self.policy)
        self.calibration = make_calibration(
            config.calibration, config.monitor, self.loss, self.policy
        )
        self.best = BestEvaluation(config.evaluation)
        self.spikes = SpikeDetector()
        self.metric_names = metric_names(self.loss, self.run.train.source_names)
        self.window = metrics.Window(self.metric_names)
        self.guard = NonFiniteGuard(
            self.window, self.run.train, self.policy.device, self.run.folder, display
        )
        self.stateful: dict[str, StepHook] = {  # by their key in a checkpoint
            "reference_point": self.reference_point,
            "balance": self.calibration,
            "spikes": self.spikes,
            "skipped": self.guard.skipped,
        }
        self.hooks = [*self.stateful.values(), self.guard.tracker]
        steps = self.run.steps or config.training.steps
        self.steps = steps or config.training.epochs * self.plan.steps_per_epoch
        self.optimizer = make_optimizer(config.optim, self.parameters)
        if (advice := warmup_advice(config.optim, self.steps)) is not None:
            display.note(advice)
        self.memory = self.run.memory
        self.memory.save(self.run.folder)
        self.margins = config.margins
        self.lengths = self.run.train.lengths
        self.checkpoints = checkpoint.Checkpoints(
            self.run.folder / "checkpoints", config.training.keep_checkpoints
        )
        self.exporter = Exporter(config, self.policy, self.run.tokenizer, self.run.folder)
        self.profiler = Profiler()
        self.step = self.tokens = 0
        self.base_weights = base_weights.fingerprints(config)
        if self.run.checkpoint is not None:
            self._resume(self.run.checkpoint)
        self.checkpoints.delete_after(self.step)
        self.exporter.delete_after(self.step)
        self.trackers = metrics.open_trackers(
            self.run.folder, config.training.report_to, config.model_dump(), self.step, display.note
        )
        self.samples = Samples.of(config.evaluation, self.run, self.step, display.note)
        run_config.save(config, self.run, display.note)

    def use(self, train: DataSplit) -> None:
        """Train on other data from the next step on; `train.plan.first_step` is that step."""
        self.run = replace(self.run, train=train)
        self.run = self.run.with_micro_batch_tokens(self.memory.micro_batch_tokens)
        self.plan, self.lengths = self.run.train.plan, self.run.train.lengths
        self.guard.data = self.run.train

    def loop(self, received: list[int], until: int | None = None) -> None:
        """Train from the current step to the last; a signal in `received` ends it after a step.

        until: stop after so many steps of the run, with a checkpoint.
        """
        with manual_collection():
            try:
                self._loop(received, until)
            finally:
                self.checkpoints.wait()

    def _loop(self, received: list[int], until: int | None) -> None:
        t, steps = self.config.training, self.steps if until is None else until
        self.display.phase("train", self.steps, self.step)
        self.clock = Clock()
        if self.run.eval and self.step == 0:
            self._evaluate(self.run.eval)
        first, self._logged_at = self.step, (self.tokens, 0.0)
        while self.step < steps and not self.best.stops:
            last = self.step + 1 == steps
            logs = last or self.step == 0 or _is_due(self.step + 1, t.log_every)
            metric_sums = self._train_step(with_entropy=logs)
            self.display.advance(self.step)
            self.checkpoints.poll()
            self.profiler.step()
            self.memory.correct(self.step - first)
            saves = _is_due(self.step, t.checkpoint_every)
            saves |= last and (t.checkpoint_every is not None or until is not None)
            evaluates = self.run.eval and (last or _is_due(self.step, t.eval_every))
            if logs or evaluates:
                self.guard.stop_unless_finite()
            if logs:
                self._log(metric_sums, done=(self.step - first) / (steps - first))
            if self.run.eval and evaluates:
                self._evaluate(self.run.eval)
                saves |= self.best.is_at(self.step)
                if self.best.stops and not last:
                    saves |= t.checkpoint_every is not None
                    if not logs:
                        self._log(None, done=(self.step - first) / (steps - first))
            # Read once a step, here: a signal may come at any moment, and the ranks must agree.
            if self.display.is_closed and not received:
                received.append(signal.SIGPIPE)
            stops = not distributed.all_ranks(not received) and not last
            # Before the checkpoint, after which a resumed run does not come to this step again.
            if _is_due(self.step, t.export_every):
                self.guard.stop_unless_finite()
                with self.clock.pause():
                    self.display.note(f"export: {self.exporter.write_step(self.step)}")
            if saves or stops:
                self.guard.stop_unless_finite()
                self._save()
            if stops:
                number = received[0] if received else signal.SIGTERM  # another rank's
                raise signals.Interrupted(
                    number,
                    f"stopped by {signals.describe(number)} after step {self.step}; "
                    "continue with resume=auto",
                )

    def _train_step(self, with_entropy: bool) -> StepSums | None:
        """Take one optimizer step and return its sums, or None if the step is skipped."""
        rate = learning_rate(self.config.optim, self.step, self.steps)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        metric_sums = self.memory.within(
            self.step + 1, lambda: self._accumulate_gradient(with_entropy), self._discard_gradient
        )
        with part("clip and update"):
            self.gradient.finish()
            limit = self.config.optim.max_grad_norm or math.inf
            grad_norm = fsdp.full_tensor(nn.utils.clip_grad_norm_(self.parameters, limit))
            groups_in_step = self.plan.groups(self.step)
            self.step += 1
            self.tokens += int(self.lengths[groups_in_step].sum())
            self.window.add(self.step, grad_norm, metric_sums.sums)
            if self.config.training.nonfinite == "skip" and self.guard.skips(self.hooks):
                return None
            self.optimizer.step()
        for hook in self.hooks:
            hook.after_step()
        return metric_sums

    def _discard_gradient(self) -> None:
        """Drop what a part of a step has computed, and take the new memory budget."""
        for hook in self.hooks:
            hook.discard_step()
        self.gradient.discard()
        self.run = self.run.with_micro_batch_tokens(self.memory.micro_batch_tokens)
        self.plan = self.run.train.plan

    def _accumulate_gradient(self, with_entropy: bool) -> StepSums:
        """Run all micro-batches of a step forward and backward."""
        data, groups_in_step = self.run.train, self.plan.groups(self.step)
        for hook in self.hooks:
            hook.before_step(self.step)
        reference_point = self.reference_point.of_step(data, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        metric_sums = MetricSums(
            self.loss, self.margins, self.policy.device, sources=data.source_names
        )
        for micro_batch in data.micro_batches(self.policy, self.step):
            self.memory.observe(micro_batch.batches)
            with part("forward and loss"):
                scores = self.calibration.scores()
                logps = self.forward(micro_batch.batches, data.reference, with_entropy, scores)
                policy = self.calibration.calibrate(
                    logps, micro_batch.is_real, micro_batch.accumulated
                )
                output = losses.evaluate(self.loss, policy, logps.reference, reference_point)
            with part("backward"):
                scale = micro_batch.is_real / len(groups_in_step)  # the only normalization
                self.gradient.backward(output.loss.sum() * scale, logps.policy, scale)
            if micro_batch.is_real:
                for hook in self.hooks:
                    hook.after_micro_batch(micro_batch.groups, logps, output)
                metric_sums.add(logps, output, data.sources_of(micro_batch.groups))
        return metric_sums

    @torch.no_grad()
    def _evaluate(self, split: DataSplit) -> None:
        """Log metrics over the held-out data, under names that begin with `eval_`."""
        began = self.clock.seconds()
        self.policy.eval()
        metric_sums = MetricSums(
            self.loss, self.margins, self.policy.device, detailed=True, sources=split.source_names
        )
        for step in range(split.plan.steps_per_epoch):
            reference_point = self.reference_point.of_step(split, step)
            for micro_batch in split.micro_batches(self.policy, step):
                logps = self.forward(micro_batch.batches, split.reference, with_entropy=True)
                output = losses.evaluate(self.loss, logps.policy, logps.reference, reference_point)
                if micro_batch.is_real:
                    metric_sums.add(logps, output, split.sources_of(micro_batch.groups))
        self.policy.train()
        values = metric_sums.evaluation(split.groups.has_preferences)
        record = {"step": self.step, "epoch": self._epoch, **values}
        record["eval_runtime"] = self.clock.evaluated(self.step, began)
        self._track(record)
        self.display.note(progress.evaluation(record))
        self.best.add(self.step, record)
        self.samples.write(self.step)

    def _log(self, metric_sums: StepSums | None, done: float) -> None:
        gc.collect(1)
        seconds, (tokens, then) = self.clock.seconds(), self._logged_at
        self._logged_at = (self.tokens, seconds)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self._epoch,
            **self._spikes(),
            **self.guard.skipped.metrics(),
            **self.window.flush(),
            **self.calibration.metrics(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.loss.of_rewards:
            record = of_rewards(record)
        elif metric_sums is not None:  # of this step only: it costs one more pass over the head
            record["entropy"] = metric_sums.entropy()
        record["num_tokens"] = self.tokens
        record["tokens_per_second"] = (self.tokens - tokens) / max(seconds - then, 1e-9)
        record["peak_memory_gib"] = metrics.peak_memory(self.policy.device)
        self._track(record)
        every = self.config.training.eval_every
        evaluations = self.clock.evaluations_left(self.step, self.steps, every)
        self.display.metrics(record, seconds * (1 - done) / done, evaluations)

    def _track(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def _spikes(self) -> dict[str, dict[str, float]]:
        """Loss spikes of the window's steps, by step."""
        steps, rows = self.window.state_dict()
        spikes = {}
        losses_of_steps = rows[:, 1] / rows[:, 1 + len(self.metric_names)]
        for step, loss in zip(steps, losses_of_steps.tolist(), strict=True):
            usual = self.spikes.usual
            if self.spikes.is_spike(loss):
                spikes[str(step)] = loss
                self.display.note(f"loss spike at step {step:,}: {loss:.4g}, usually {usual:.4g}")
        return {"loss/spikes": spikes} if spikes else {}

    def skip_to(self, step: int) -> None:
        """Leave out the steps before `step`, and write a checkpoint."""
        self.step = step
        self._save()
        self.checkpoints.wait()

    def _save(self) -> None:
        steps, rows = self.window.state_dict()
        position = {
            "tokens": self.tokens,
            "window": [steps, rows.tolist()],
            "plan": self._plan_key,
            "base": self.base_weights,
            "best": self.best.state_dict(),
            **{name: hook.state_dict() for name, hook in self.stateful.items()},
        }
        self.checkpoints.save(
            self.step, self.policy, self.optimizer, position, self.run.further_tensors
        )
        # A full collection: buffers of the previous checkpoint have reached the oldest generation.
        gc.collect()

    def _resume(self, folder: Path) -> None:
        position = checkpoint_files.position(folder)
        run_folder.check_order(folder, self.config, self._plan_key, position["plan"])
        run_folder.check_steps(folder, position["step"], self.steps)
        checkpoint.restore(folder, self.policy, self.optimizer, self.run.further_tensors)
        steps, rows = position["window"]
        self.window.load_state_dict(steps, torch.tensor(rows, dtype=torch.float64))
        for name, hook in self.stateful.items():
            hook.load_state_dict(position[name])
        self.best.load_state_dict(position.get("best"))
        self.step, self.tokens = position["step"], position["tokens"]
        self.display.note(f"resumed from {folder}")

    def close(self) -> None:
        """Finish the pending checkpoint, and close trackers."""
        self.checkpoints.close()
        for tracker in self.trackers:
            tracker.close()

    def export(self) -> Path:
        """Close trackers, write the model in Hugging Face format, and return its folder."""
        self.close()
        step = self.best.restore(self.run.folder, self.policy, self.step)
        splits = [split for split in (self.run.train, self.run.eval) if split is not None]
        datasets = [in_memory(split.groups) for split in splits]
        check_after_training(self.policy, datasets, self.display)
        folder = self.run.folder / "model"
        self.exporter.write(folder, step)
        if self.guard.skipped.count:
            self.display.note(f"skipped: {self.guard.skipped.count:,} of {self.steps:,} steps")
        for line in self.best.summary(self.step, self.steps, step):
            self.display.note(line)
        self.display.note(f"model: {folder}")
        self.exporter.upload(folder, self.display)
        return folder

    @property
    def _plan_key(self) -> list[Any]:
        dataset = self.run.train.groups
        return [dataset.fingerprint, dataset.labels, self.plan.batch_size, self.plan.seed]

    @property
    def _epoch(self) -> float:
        return round((self.step - self.plan.first_step) / self.plan.steps_per_epoch, 4)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
