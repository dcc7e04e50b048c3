"""TRL's DPO on the pairs, in the order and from the adapter of fastpref's run."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks.real_model.bench import CURVE, Bench, Values, curves
from fastpref.data.batch_plan import Plan
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy


def train_trl(bench: Bench) -> Values:
    """Train with TRL; return curves, seconds and held-out metrics."""
    from datasets import Dataset
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from trl import DPOConfig, DPOTrainer

    setting, config = bench.setting, bench.config("hh", "dpo")
    assert config.adapter is not None
    fresh = load_policy(
        config.model, bench.tokenizer, torch.device("cpu"), config.training, config.parallel,
        adapter=config.adapter,
    )  # fmt: skip
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(fresh.causal_lm).items()}
    del fresh
    # "all-linear" of peft is every linear layer except the head, as in fastpref.
    lora = LoraConfig(
        r=setting.r, lora_alpha=setting.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(bench.causal_lm(), lora)
    loaded: Any = set_peft_model_state_dict(model, initial)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    groups, rows = bench.groups("hh-train"), bench.rows("hh-train")
    plan = Plan.of(groups, setting.batch_size, sys.maxsize, config.training.seed)
    order = [rows[groups[i].row - 1] for step in plan.epoch() for part in step for i in part]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(bench.folder / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=setting.batch_size // setting.micro_batch,
            train_sampling_strategy="sequential",
            max_length=setting.sources["hh"].max_length,
            beta=0.1,
            learning_rate=setting.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(order),
        processing_class=bench.tokenizer,
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    policy = Policy(model.merge_and_unload(), torch.float32)
    return {
        **curves(trainer.state.log_history),
        "training_seconds": round(seconds, 1),
        "held_out": bench.judge(policy, "hh"),
    }


def largest_difference(ours: Values, theirs: Values) -> dict[str, float]:
    """Largest difference of two runs in any step, by metric."""
    return {
        name: max(abs(a - b) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in CURVE
    }
