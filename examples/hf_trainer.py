"""Preference training with the plain `transformers.Trainer`: any objective on pairs.

    python examples/hf_trainer.py                            # a tiny random model, seconds on a CPU
    python examples/hf_trainer.py --model Qwen/Qwen2.5-0.5B --lr 1e-6 --loss dpo
    torchrun --nproc-per-node 2 examples/hf_trainer.py       # on several devices or processes

Objectives on single responses and on groups need more arguments: see docs/integrations.md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from typing import Any

import torch
from plain_pytorch import collate, load, pairs
from transformers import Trainer, TrainingArguments

from fastpref import losses
from fastpref.fused import ModelLoss


class PreferenceTrainer(Trainer):
    """A trainer whose batches are preference pairs."""

    def __init__(self, *args: Any, preference_loss: ModelLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preference_loss = preference_loss
        self.model_accepts_loss_kwargs = False  # so that accumulated batches are averaged
        self.metrics: dict[str, torch.Tensor] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self.accelerator.autocast():
            loss, self.metrics = self.preference_loss(model, **inputs)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the newest batch to the line."""
        logs |= {name: value.item() for name, value in self.metrics.items()}
        super().log(logs, start_time)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and return the logged losses."""
    parser = argparse.ArgumentParser(description="Preference training with transformers.Trainer.")
    parser.add_argument("--model", help="folder or Hub name; a tiny random model by default")
    parser.add_argument("--loss", default="simpo", help="one of `fastpref losses`")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingArguments(
            folder, max_steps=options.steps, learning_rate=options.lr, logging_steps=1,
            per_device_train_batch_size=8, remove_unused_columns=False, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(),  # processes on a CPU meet, too
        )  # fmt: skip
        needs_reference = losses.build(options.loss).needs_reference
        reference = copy.deepcopy(model).to(config.device) if needs_reference else None
        trainer = PreferenceTrainer(
            model, config, train_dataset=pairs(64),
            data_collator=partial(collate, tokenizer=tokenizer),
            preference_loss=ModelLoss(model, options.loss, reference=reference),
        )  # fmt: skip
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
