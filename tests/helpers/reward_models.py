"""Folders of reward models."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.helpers.data import LLAMA


def random_reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Write a tiny Llama with one label and random weights, and its tokenizer."""
    torch.manual_seed(0)
    pad = tokenizer.convert_tokens_to_ids("<pad>")
    options = {**LLAMA, "initializer_range": 0.3, "num_labels": 1, "pad_token_id": pad}
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
