"""Policies of a config, as a run loads them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy


def policy_of(
    config: Config, tokenizer: PreTrainedTokenizerBase | Any, device: torch.device | None = None
) -> Policy:
    """Load the policy of a config; on the CPU unless a device is given."""
    return load_policy(
        config.model,
        tokenizer,
        device or torch.device("cpu"),
        config.training,
        config.parallel,
        adapter=config.adapter,
        keep_initial_adapter=config.reference_mode == "adapter",
    )
