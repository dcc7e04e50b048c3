"""Adapters: a few trained weights beside the frozen ones of a model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fastpref import config as configs
from fastpref.model import ModelError, cannot_load


def add_adapter(causal_lm: PreTrainedModel, adapter: configs.Adapter) -> nn.Module:
    import peft

    try:
        return peft.get_peft_model(
            causal_lm,
            peft.LoraConfig(
                r=adapter.r,
                lora_alpha=adapter.alpha,  # type: ignore[arg-type]
                lora_dropout=adapter.dropout,
                target_modules=adapter.targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(cannot_load("adapter.targets", str(adapter.targets), error)) from None
