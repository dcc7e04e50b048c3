"""TRL's DPO trainer without logits, with TRL's losses or any objective of fastpref.

    python examples/trl_dpo.py                               # a tiny random model, seconds on a CPU
    python examples/trl_dpo.py --loss-type sigmoid bco_pair sft
    python examples/trl_dpo.py --objective kto --lora        # or stapo, tdpo2, nca, ...
    python examples/trl_dpo.py --model Qwen/Qwen2.5-0.5B --lr 1e-6

Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from plain_pytorch import load, pairs
from trl import DPOConfig, DPOTrainer

from fastpref.fused.trl import fused

FusedDPOTrainer = fused(DPOTrainer)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and return the logged losses."""
    parser = argparse.ArgumentParser(description="TRL's DPO trainer with the fused loss.")
    parser.add_argument("--model", help="folder or Hub name; a tiny random model by default")
    parser.add_argument("--loss-type", nargs="+", default=["sigmoid"], help="of TRL's DPOConfig")
    parser.add_argument("--objective", help="one of `fastpref losses`, in place of --loss-type")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        path, tokenizer = options.model, None
        if path is None:  # TRL loads the reference model from where the policy came
            path = f"{folder}/model"
            model, tokenizer = load(None)
            model.save_pretrained(path)
        trainer = FusedDPOTrainer(
            path,
            objective=options.objective,
            args=DPOConfig(
                folder, loss_type=options.loss_type, max_steps=options.steps,
                learning_rate=options.lr, logging_steps=1,
                per_device_train_batch_size=8, save_strategy="no", report_to=[],
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(pairs(64)),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM") if options.lora else None,
        )  # fmt: skip
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
