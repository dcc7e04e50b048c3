"""TRL trainers of the tiny Llama, for the tests of the fused loss in them."""

from __future__ import annotations

import warnings

import trl
from datasets import Dataset

from fastpref.fused.trl import FusedDPOMixin
from tests.helpers.data import rows


class FusedDPOTrainer(FusedDPOMixin, trl.DPOTrainer):
    pass


def trainers(folder, tiny_llama, tokenizer):
    """What makes a trainer, four pairs to a batch; `trainer` returns further arguments for it."""

    def make(cls, model=tiny_llama, trainer=None, count=40, **config):
        options = {
            "output_dir": str(folder / "out"),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_length": 64,
            "seed": 3,
        }
        data = Dataset.from_list(rows(count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(
                model=model,
                args=trl.DPOConfig(**{**options, **config}),
                train_dataset=data,
                eval_dataset=data.select(range(6)),
                processing_class=tokenizer,
                **(trainer() if trainer else {}),
            )

    return make


def history(trainer):
    trainer.train()
    return trainer.state.log_history
