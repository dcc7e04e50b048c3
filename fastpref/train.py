"""The training loop: plan → forward → objective → backward → clip → step → metrics.

    loss of a step = sum of the losses of its pairs, responses or groups / their number

is the only normalisation, so micro-batches and accumulation do not change the result.
"""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import checkpoint, interrupts, metrics, model_card, monitors, progress
from fastpref.balance import balance
from fastpref.config import Config, ConfigError
from fastpref.data.batches import Batch
from fastpref.errors import UserError
from fastpref.files import replacing
from fastpref.forward import Forward, Seen
from fastpref.losses import Output
from fastpref.optim import learning_rate, make_optimizer
from fastpref.prepare import Split, prepare
from fastpref.pretrained import export
from fastpref.reference_point import reference_point
from fastpref.update import Gradient, Projected

NAMES = metrics.PAIR_METRICS + monitors.MONITORS


class Diverged(UserError):
    """The loss or the gradient is no longer finite."""


def train(config: Config, display: progress.Display) -> Path:
    """Run a config to its end and return the folder of the exported model.

    Raises UserError for what a user can mend, and Interrupted after SIGTERM or Ctrl-C.
    """
    trainer = Trainer(config, display)
    with interrupts.collecting() as signals:
        trainer.loop(signals)
    return trainer.export()


class Trainer:
    """One run: the policy, its data and reference, the optimizer, and the position in the plan."""

    def __init__(self, config: Config, display: progress.Display) -> None:
        self.config, self.display = config, display
        self.run = prepare(config, display)
        self.policy, self.plan = self.run.policy, self.run.train.plan
        self.loss: Any = self.run.loss
        self.forward = Forward(self.loss, self.policy)
        self.point = reference_point(self.loss, self.policy)
        self.balance = balance(config, self.loss, self.policy)
        self.update = Projected(self._trained) if config.update == "projected" else Gradient()
        self.steps = config.training.steps or config.training.epochs * self.plan.steps_per_epoch
        self.optimizer = make_optimizer(config.optim, self._trained)
        self.window = metrics.Window(NAMES)
        self.margins = config.margins
        self.step = self.tokens = 0
        if self.run.checkpoint is not None:
            self._resume(self.run.checkpoint)
        self.trackers = metrics.trackers(
            self.run.folder, config.training.track, config.model_dump(), self.step
        )
        saved = self.run.folder / "config.yaml"
        if self.run.checkpoint is not None and saved.exists():
            for difference in config.differences(saved):
                display.note(f"changed since the run began: {difference}")
        saved.write_text(config.to_yaml(), encoding="utf-8")

    def loop(self, signals: list[int]) -> None:
        """Train from the current step to the last; a signal ends it after the step at hand."""
        t = self.config.training
        self.display.phase("train", self.steps, self.step)
        if self.run.eval and self.step == 0:
            self._evaluate(self.run.eval)
        first, self._started, self._logged_at = self.step, time.monotonic(), (self.tokens, 0.0)
        while self.step < self.steps:
            last = self.step + 1 == self.steps
            logs = last or self.step == 0 or _due(self.step + 1, t.log_every)
            entropy = self._train_step(with_entropy=logs)
            self.display.advance(self.step)
            saves = _due(self.step, t.checkpoint_every)
            saves |= last and t.checkpoint_every is not None
            evaluates = self.run.eval and (last or _due(self.step, t.eval_every))
            if logs or evaluates:
                self._stop_unless_finite()
            if logs:
                self._log(entropy, done=(self.step - first) / (self.steps - first))
            if self.run.eval and evaluates:
                self._evaluate(self.run.eval)
            # Looked at once, here: a signal may come at any moment, and must not go unsaved.
            stops = bool(signals) and not last
            if saves or stops:
                self._stop_unless_finite()
                self._save()
            if stops:
                raise interrupts.Interrupted(
                    signals[0],
                    f"stopped by {signal.Signals(signals[0]).name} after step {self.step}; "
                    "continue with resume=auto",
                )

    def _train_step(self, with_entropy: bool) -> Tensor | None:
        """One optimizer step; returns (sum of token entropies, tokens) where it is asked for."""
        micro_batches = self.plan.step(self.step)
        count = sum(map(len, micro_batches))
        point = self.point.of_step(self.run.train, self.step)
        rate = learning_rate(self.config.optim, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums, entropies = [], []
        for indices in micro_batches:
            batches = self.policy.batches(self.run.train.groups, indices)
            seen, output = self._forward(batches, self.run.train, point, with_entropy)
            self.update.backward(seen.policy, output, count)
            self.point.see(seen.policy, output)
            sums.append(self._sums(seen, output)[0])
            entropies.append(seen.entropy)
            self.tokens += sum(batch.tokens for batch in batches)
        self.update.finish()
        norm = nn.utils.clip_grad_norm_(self._trained, self.config.optim.max_grad_norm or math.inf)
        self.optimizer.step()
        self.point.end_step()
        self.balance.end_step()
        self.step += 1
        self.window.add(self.step, norm, torch.stack(sums).sum(0))
        return torch.stack(entropies).sum(0) if with_entropy else None  # type: ignore[arg-type]

    def _forward(
        self, batches: list[Batch], split: Split, point: Tensor | None, with_entropy: bool
    ) -> tuple[Seen, Output]:
        """Log-probs and losses of one micro-batch, in one or more forward passes."""
        geometry = torch.is_grad_enabled() and self.balance.wants_geometry(self.step)
        seen = self.forward(batches, split.reference, with_entropy, geometry)
        calibrated = self.balance.calibrated(seen, self.step)
        output = self.loss(calibrated, seen.reference, *([] if point is None else [point]))
        return seen, output

    @torch.no_grad()
    def _evaluate(self, split: Split) -> None:
        """Metrics over the held-out data, under names that begin with `eval_`."""
        self.policy.eval()
        sums, entropies = [], []
        contrasts: list[Any] = []  # tensors, or None for objectives without pairs
        for number, step in enumerate(split.plan.epoch()):
            point = self.point.of_step(split, number)
            for indices in step:
                batches = self.policy.batches(split.groups, indices)
                seen, output = self._forward(batches, split, point, with_entropy=True)
                found, contrast = self._sums(seen, output)
                sums.append(found)
                entropies.append(seen.entropy)
                contrasts.append(contrast)
        self.policy.train()
        means = metrics.means(torch.stack(sums).sum(0), NAMES)
        record: dict[str, Any] = {"step": self.step, "epoch": self._epoch}
        record |= {f"eval_{name}": value for name, value in means.items()}
        record["eval_entropy"] = metrics.mean(torch.stack(entropies).sum(0))  # type: ignore[arg-type]
        if contrasts[0] is not None:
            record["eval_contrast/histogram"] = monitors.histogram(torch.cat(contrasts))
        self._track(record)
        self.display.note(progress.evaluation(record))

    def _sums(self, seen: Seen, output: Output) -> tuple[Tensor, Tensor | None]:
        """Sums and counts of NAMES over a micro-batch, and the contrastive logits of its pairs."""
        policy, reference = seen.policy, seen.reference
        contrast = monitors.contrastive_logits(policy, reference, self.loss.needs_reference)
        watched = monitors.monitor_sums(policy, reference, contrast, self.margins)
        return torch.cat([metrics.sums_and_counts(output, policy), watched], 1), contrast

    def _log(self, entropy: Tensor | None, done: float) -> None:
        seconds, (tokens, then) = time.monotonic() - self._started, self._logged_at
        self._logged_at = (self.tokens, seconds)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self._epoch,
            **self.window.flush(),
            **self.balance.flush(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "entropy": metrics.mean(
                entropy
            ),  # of this step alone: it costs one more pass over the head
            "num_tokens": self.tokens,
            "tokens_per_second": (self.tokens - tokens) / max(seconds - then, 1e-9),
            "peak_memory_gib": metrics.peak_memory(self.policy.device),
        }
        self._track(record)
        self.display.metrics(record, seconds_left=seconds * (1 - done) / done)

    def _track(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def _stop_unless_finite(self) -> None:
        """Raise Diverged, and save the row numbers, for a step with a loss or gradient gone."""
        found = self.window.first_non_finite()
        if found is None:
            return
        indices = [index for part in self.plan.step(found.step - 1) for index in part]
        rows = sorted({self.run.train.groups[index].row for index in indices})
        report = {"step": found.step, "metric": found.metric, "value": str(found.value)}
        path = self.run.folder / "nonfinite.json"
        path.write_text(json.dumps({**report, "rows": rows}, indent=1))
        raise Diverged(
            f"training stopped: {found.metric} is {found.value} at step {found.step}; "
            f"the rows of that step are in {path}; lower optim.lr or look at them"
        )

    def _save(self) -> None:
        steps, rows = self.window.state()
        position: dict[str, Any] = {"tokens": self.tokens, "window": steps}
        position |= {"plan": self._plan_key, "reference_point": self.point.state()}
        position |= {"balance": self.balance.state()}
        root, keep = self.run.folder / "checkpoints", self.config.training.keep_checkpoints
        checkpoint.save(root, self.step, self.policy, self.optimizer, position, rows, keep)

    def _resume(self, folder: Path) -> None:
        position = checkpoint.position(folder)
        if position["plan"] != self._plan_key:
            raise ConfigError(
                "resume: the data, training.batch_size or training.seed are not those of "
                f"{folder}; restore them or choose another training.output"
            )
        rows = checkpoint.restore(folder, self.policy, self.optimizer)
        self.window.restore(position["window"], rows)
        self.point.restore(position["reference_point"])
        self.balance.restore(position["balance"])
        self.step, self.tokens = position["step"], position["tokens"]
        self.display.note(f"resumed from {folder}")

    def export(self) -> Path:
        """Close the trackers and write the model in Hugging Face format; returns its folder."""
        for tracker in self.trackers:
            tracker.close()
        adapter, folder = self.config.adapter, self.run.folder / "model"
        with replacing(folder) as temporary:
            export(self.policy, self.run.tokenizer, temporary, adapter is None or adapter.merge)
            model_card.write(temporary, self.config, self.run.folder / "metrics.jsonl")
        self.display.note(f"model: {folder}")
        return folder

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @property
    def _plan_key(self) -> list[Any]:
        dataset = self.run.train.groups
        return [dataset.fingerprint, dataset.labels, self.plan.batch_size, self.plan.seed]

    @property
    def _epoch(self) -> float:
        return round(self.step / self.plan.steps_per_epoch, 4)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
