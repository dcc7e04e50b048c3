"""The training loop: plan → forward → objective → backward → clip → step → metrics.

    loss of a step = sum of the losses of its pairs, responses or groups / their number

is the only normalisation, so micro-batches and accumulation do not change the result.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import distributed, metrics
from fastpref.config import Config, ConfigError
from fastpref.data.batch_plan import tokens_of
from fastpref.data.collate import Batch
from fastpref.losses import Output
from fastpref.model import fsdp
from fastpref.model.export import export
from fastpref.training import anomalies, checkpoint, checkpoint_files, model_card, run_lock
from fastpref.training import signals as interrupts
from fastpref.training.calibration_step import balance
from fastpref.training.forward import Forward, MicroBatchLogps
from fastpref.training.metric_sums import NAMES, MetricSums
from fastpref.training.optim import learning_rate, make_optimizer
from fastpref.training.profiler import Profiler, part, profiling
from fastpref.training.reference_point import reference_point
from fastpref.training.setup import DataSplit, prepare
from fastpref.training.step_gradient import Gradient, Projected
from fastpref.utils import progress
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError


class Diverged(UserError):
    """The loss or the gradient is no longer finite."""


def train(config: Config, display: progress.Display, profile: bool = False) -> Path:
    """Run a config to its end and return the folder of the exported model.

    profile: write where the time of a step goes. Raises UserError for what a user can mend, and
    Interrupted after SIGTERM or Ctrl-C.
    """
    with run_lock.held(Path(config.training.output_dir)):
        trainer = Trainer(config, display)
        folder = (
            trainer.run.folder / "profile" if profile and distributed.is_main_process() else None
        )
        with interrupts.collecting() as signals, profiling(folder) as trainer.profiler:
            trainer.loop(signals)
        if folder is not None:
            display.note(f"profile: {folder}\n{(folder / 'table.txt').read_text()}")
        return trainer.export()


class Trainer:
    """One run: the policy, its data and reference, the optimizer, and the position in the plan."""

    def __init__(self, config: Config, display: progress.Display) -> None:
        self.config, self.display = config, display
        self.run = prepare(config, display)
        self.policy, self.plan = self.run.policy, self.run.train.plan
        self.loss: Any = self.run.loss
        self.trained = list(self.policy.trainable_parameters().values())
        self.forward = Forward(self.loss, self.policy)
        self.point = reference_point(self.loss, self.policy)
        self.balance = balance(config, self.loss, self.policy)
        self.update = (Projected if config.update == "dpo_pg" else Gradient)(self.trained)
        self.steps = config.training.steps or config.training.epochs * self.plan.steps_per_epoch
        self.optimizer = make_optimizer(config.optim, self.trained)
        self.window = metrics.Window(NAMES)
        self.losses, self.spikes = anomalies.NonFiniteTracker(), anomalies.SpikeDetector()
        self.skipped = anomalies.SkippedSteps()
        self.margins = config.margins
        self.lengths = tokens_of(self.run.train.groups, "packed")
        self.checkpoints = checkpoint.Checkpoints(
            self.run.folder / "checkpoints", config.training.keep_checkpoints
        )
        self.profiler = Profiler()
        self.step = self.tokens = 0
        if self.run.checkpoint is not None:
            self._resume(self.run.checkpoint)
        self.checkpoints.abandon_after(self.step)
        self.trackers = metrics.trackers(
            self.run.folder, config.training.report_to, config.model_dump(), self.step
        )
        saved = self.run.folder / "config.yaml"
        if self.run.checkpoint is not None and saved.exists():
            for difference in config.differences(saved):
                display.note(f"changed since the run began: {difference}")
        if distributed.is_main_process():
            with replacing(saved) as temporary:
                temporary.write_text(config.to_yaml(), encoding="utf-8")

    def loop(self, signals: list[int]) -> None:
        """Train from the current step to the last; a signal ends it after the step at hand."""
        gc.collect()
        gc.freeze()  # what is there now stays: later collections need not look at it
        gc.disable()  # they would stop the one or the other rank at any moment
        try:
            self._loop(signals)
        finally:
            gc.enable()
            gc.unfreeze()
            self.checkpoints.wait()

    def _loop(self, signals: list[int]) -> None:
        t = self.config.training
        self.display.phase("train", self.steps, self.step)
        if self.run.eval and self.step == 0:
            self._evaluate(self.run.eval)
        first, self._started, self._logged_at = self.step, time.monotonic(), (self.tokens, 0.0)
        while self.step < self.steps:
            last = self.step + 1 == self.steps
            logs = last or self.step == 0 or _due(self.step + 1, t.log_every)
            tally = self._train_step(with_entropy=logs)
            self.display.advance(self.step)
            self.checkpoints.poll()
            self.profiler.step()
            saves = _due(self.step, t.checkpoint_every)
            saves |= last and t.checkpoint_every is not None
            evaluates = self.run.eval and (last or _due(self.step, t.eval_every))
            if logs or evaluates:
                self._stop_unless_finite()
            if logs:
                self._log(tally, done=(self.step - first) / (self.steps - first))
            if self.run.eval and evaluates:
                self._evaluate(self.run.eval)
            # Looked at once, here: a signal may come at any moment, and must not go unsaved.
            stops = not distributed.all_ranks(not signals) and not last
            if saves or stops:
                self._stop_unless_finite()
                self._save()
            if stops:
                number = signals[0] if signals else signal.SIGTERM  # another rank's
                raise interrupts.Interrupted(
                    number,
                    f"stopped by {signal.Signals(number).name} after step {self.step}; "
                    "continue with resume=auto",
                )

    def _train_step(self, with_entropy: bool) -> MetricSums | None:
        """One optimizer step; None of one that is skipped."""
        groups = self.plan.groups(self.step)
        point = self.point.of_step(self.run.train, self.step)
        rate = learning_rate(self.config.optim, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        tally = MetricSums(self.loss, self.margins, self.policy.device)
        for indices in self.plan.step(self.step):
            counts = bool(indices)
            with part("batch"):
                batches = self.run.train.batches(self.policy, indices)
            with part("forward and loss"):
                seen, output = self._forward(batches, self.run.train, point, with_entropy, counts)
            with part("backward"):
                self.update.backward(seen.policy, output, len(groups) if counts else math.inf)
            if counts:
                self.point.see(seen.policy, output)
                self.losses.see(self.step + 1, indices, output.loss)
                tally.add(seen, output)
        with part("clip and update"):
            self.update.finish()
            limit = self.config.optim.max_grad_norm or math.inf
            norm = fsdp.full_tensor(nn.utils.clip_grad_norm_(self.trained, limit))
            self.step += 1
            self.tokens += int(self.lengths[groups].sum())
            self.window.add(self.step, norm, tally.sums)
            if self.config.training.nonfinite == "skip" and self._skips():
                return None
            self.optimizer.step()
        self.point.end_step()
        self.balance.end_step()
        return tally

    def _forward(
        self,
        batches: list[Batch],
        split: DataSplit,
        point: Tensor | None,
        with_entropy: bool,
        counts: bool,
    ) -> tuple[MicroBatchLogps, Output]:
        """Log-probs and losses of one micro-batch, in one or more forward passes."""
        geometry = torch.is_grad_enabled() and self.balance.wants_geometry(self.step)
        seen = self.forward(batches, split.reference, with_entropy, geometry)
        calibrated = self.balance.calibrated(seen, self.step) if counts else seen.policy
        output = self.loss(calibrated, seen.reference, *([] if point is None else [point]))
        return seen, output

    @torch.no_grad()
    def _evaluate(self, split: DataSplit) -> None:
        """Metrics over the held-out data, under names that begin with `eval_`."""
        self.policy.eval()
        tally = MetricSums(self.loss, self.margins, self.policy.device, closely=True)
        for number, step in enumerate(split.plan.epoch()):
            point = self.point.of_step(split, number)
            for indices in step:
                batches = split.batches(self.policy, indices)
                seen, output = self._forward(batches, split, point, True, bool(indices))
                if indices:
                    tally.add(seen, output)
        self.policy.train()
        found = tally.evaluation(split.groups.has_preferences)
        record = {"step": self.step, "epoch": self._epoch, **found}
        self._track(record)
        self.display.note(progress.evaluation(record))

    def _log(self, tally: MetricSums | None, done: float) -> None:
        gc.collect(1)
        seconds, (tokens, then) = time.monotonic() - self._started, self._logged_at
        self._logged_at = (self.tokens, seconds)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self._epoch,
            **self._spikes(),
            **self.skipped.flush(),
            **self.window.flush(),
            **self.balance.flush(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            # Of this step alone: it costs one more pass over the head.
            **({} if tally is None else {"entropy": tally.entropy()}),
            "num_tokens": self.tokens,
            "tokens_per_second": (self.tokens - tokens) / max(seconds - then, 1e-9),
            "peak_memory_gib": metrics.peak_memory(self.policy.device),
        }
        self._track(record)
        self.display.metrics(record, seconds_left=seconds * (1 - done) / done)

    def _track(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def _spikes(self) -> dict[str, dict[str, float]]:
        """Losses of the window's steps that are far above the usual, by step."""
        steps, rows = self.window.state()
        found = {}
        for step, loss in zip(steps, (rows[:, 1] / rows[:, 1 + len(NAMES)]).tolist(), strict=True):
            usual = self.spikes.usual
            if self.spikes.see(loss):
                found[str(step)] = loss
                self.display.note(f"loss spike at step {step:,}: {loss:.4g}, usually {usual:.4g}")
        return {"loss/spikes": found} if found else {}

    def _stop_unless_finite(self) -> None:
        """Raise Diverged for a step with a loss or a gradient that is not finite."""
        found = self.window.first_non_finite()
        if found is not None:
            raise self._diverged(found, self._rows(found.step))
        self.losses.forget()

    def _skips(self) -> bool:
        """Whether a number of the step at hand is not finite; all that it left is then dropped.

        Raises Diverged at the last of MOST_SKIPPED in a row.
        """
        found = self.window.first_non_finite()
        if found is None:
            self.losses.forget()
            self.skipped.end_row()
            return False
        rows = self._rows(found.step)
        if self.skipped.see(found.step, rows):
            raise self._diverged(
                found, rows, f", after {anomalies.MOST_SKIPPED - 1} that were skipped"
            )
        self.point.drop_step()
        self.balance.drop_step()
        self.losses.forget()
        self.window.drop_last()
        self.display.note(
            f"step {found.step:,} is skipped: {found.metric} is {found.value}, rows {_some(rows)}"
        )
        return True

    def _rows(self, step: int) -> list[int]:
        """Rows of a step whose loss is not finite; else its gradient, a sum, is not: all rows."""
        indices = self.losses.not_finite(step, self.policy.device) or self.plan.groups(step - 1)
        return sorted({self.run.train.groups[index].row for index in indices})

    def _diverged(self, found: metrics.NonFinite, rows: list[int], when: str = "") -> Diverged:
        """The error, with the row numbers saved."""
        report = {"step": found.step, "metric": found.metric, "value": str(found.value)}
        path = self.run.folder / "nonfinite.json"
        if distributed.is_main_process():
            path.write_text(json.dumps({**report, "rows": rows}, indent=1))
        return Diverged(
            f"training stopped: {found.metric} is {found.value} at step {found.step}{when}, rows "
            f"{_some(rows)} (all in {path}); look at them or lower optim.lr"
        )

    def _save(self) -> None:
        steps, rows = self.window.state()
        position = {
            "tokens": self.tokens,
            "window": [steps, rows.tolist()],
            "plan": self._plan_key,
            "reference_point": self.point.state(),
            "balance": self.balance.state(),
            "spikes": self.spikes.state(),
            "skipped": self.skipped.state(),
        }
        self.checkpoints.save(self.step, self.policy, self.optimizer, position)
        gc.collect()  # what the one before has left, too, which outlived the younger generations

    def _resume(self, folder: Path) -> None:
        position = checkpoint_files.position(folder)
        if position["plan"] != self._plan_key:
            raise ConfigError(
                "resume: the data, training.batch_size or training.seed are not those of "
                f"{folder}; restore them or choose another training.output_dir"
            )
        checkpoint.restore(folder, self.policy, self.optimizer)
        steps, rows = position["window"]
        self.window.restore(steps, torch.tensor(rows, dtype=torch.float64))
        self.point.restore(position["reference_point"])
        self.balance.restore(position["balance"])
        self.spikes.restore(position["spikes"])
        self.skipped.restore(position["skipped"])
        self.step, self.tokens = position["step"], position["tokens"]
        self.display.note(f"resumed from {folder}")

    def export(self) -> Path:
        """Close what is open and write the model in Hugging Face format; returns its folder."""
        self.checkpoints.close()
        for tracker in self.trackers:
            tracker.close()
        adapter, folder = self.config.adapter, self.run.folder / "model"
        merge = adapter is None or adapter.merge
        if not distributed.is_main_process():
            export(self.policy, self.run.tokenizer, folder, merge)  # sends its shards
            return folder
        with replacing(folder) as temporary:
            export(self.policy, self.run.tokenizer, temporary, merge)
            model_card.write(temporary, self.config, self.run.folder / "metrics.jsonl")
        if self.skipped.count:
            self.display.note(f"skipped: {self.skipped.count:,} of {self.steps:,} steps")
        self.display.note(f"model: {folder}")
        return folder

    @property
    def _plan_key(self) -> list[Any]:
        dataset = self.run.train.groups
        return [dataset.fingerprint, dataset.labels, self.plan.batch_size, self.plan.seed]

    @property
    def _epoch(self) -> float:
        return round(self.step / self.plan.steps_per_epoch, 4)


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
