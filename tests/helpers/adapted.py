"""Adapters that do something, runs with them, and log-probs computed another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref import metrics
from fastpref.config import Config
from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import load_groups
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

LORA = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def save_adapter(folder: Path, base: str, seed: int = 1, **options: Any) -> str:
    """An adapter that does something, as peft writes it."""
    torch.manual_seed(seed)
    options = {**LORA, "init_lora_weights": False, **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(folder)
    return str(folder)


def some_batch(config: Config, tokenizer: PreTrainedTokenizerFast) -> Batch:
    groups = load_groups(config.data.train, tokenizer, config.data)
    return collate([groups[i] for i in range(6)])


def plain_logps(model: Any, batch: Batch) -> Tensor:
    """Sums of log-probs from the full logits that a Hugging Face or peft model returns."""
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predictor_positions]
    logps = logits.double().log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    return torch.stack([part.sum() for part in logps.split(batch.lengths.tolist())])


def logps_of(policy: Policy, batch: Batch) -> Tensor:
    with torch.no_grad():
        return policy(batch).logps.double()


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def trained(config: Config, display: Display) -> Trainer:
    trainer = Trainer(config, display)
    trainer.loop([])
    return trainer


def rewards(config: Config) -> list[list[float]]:
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    return [[line[f"rewards/{name}"] for name in ("chosen", "rejected")] for line in lines]
