"""Hugging Face folders in and out: the policy and the tokenizer as they are loaded, the export."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fastpref import config as configs
from fastpref.adapters import add_adapter
from fastpref.errors import UserError
from fastpref.model import ModelError, Policy, cannot_load


def load_policy(
    config: configs.Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Policy:
    """Load or build the model, add adapters, and prove its head.

    Weights that are trained are kept in fp32 at least and cast by autocast; frozen ones are kept
    in the compute dtype. Raises ModelError in one line.
    """
    compute_dtype = getattr(torch, config.model.dtype)
    full = config.adapter is None
    storage = torch.promote_types(compute_dtype, torch.float32) if full else compute_dtype
    torch.manual_seed(config.training.seed)
    causal_lm: Any = _build(config.model, tokenizer, storage).to(device)
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model: the tokenizer has {len(tokenizer):,} tokens but the embedding only "
            f"{rows:,} rows"
        )
    wrapped: nn.Module = causal_lm
    if config.adapter is not None:
        causal_lm.requires_grad_(False)
        wrapped = add_adapter(causal_lm, config.adapter)
    policy = Policy(wrapped, compute_dtype)
    try:
        policy.check_head()
    except RuntimeError as error:  # e.g. heads that do not divide the width, in a config of theirs
        raise ModelError(cannot_load("model", type(causal_lm).__name__, error)) from None
    if config.training.activation_checkpointing:
        if not causal_lm.supports_gradient_checkpointing:
            raise ModelError(
                f"training.activation_checkpointing: {type(causal_lm).__name__} does not support "
                "it; set it to false"
            )
        # transformers 5.x is renaming the method; both take torch's checkpoint options first.
        older = causal_lm.gradient_checkpointing_enable
        enable = getattr(causal_lm, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    return policy.train()


def load_tokenizer(model: configs.Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer named by the config; None where one is to be trained on the data."""
    source = model.tokenizer or model.path
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub raise unrelated types
        field = "tokenizer" if model.tokenizer else "path"
        raise ModelError(cannot_load(f"model.{field}", source, error)) from None


def _build(model: configs.Model, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.path is None:
            config = _random_config(dict(model.config or {}), tokenizer)
            return AutoModelForCausalLM.from_config(_without_dropout(config), **options)
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"model.path: {model.path} is quantised, which is not supported")
        return AutoModelForCausalLM.from_pretrained(
            model.path, config=_without_dropout(config), **options
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise unrelated types
        source = model.path or str(model.config)
        raise ModelError(cannot_load("model", source, error)) from None


def _random_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A Hugging Face config from a mapping; unknown keys are refused, not silently kept."""
    kind = values.pop("model_type")
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"model.config.{key}: unknown key for {kind}{guess}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = tokenizer.pad_token_id
    return AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **special, **values})


def _without_dropout(config: Any) -> Any:
    """Log-probs of policy and reference are compared: the same weights must give the same ones."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return config


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Write the model in Hugging Face format: safetensors in the compute dtype, and the tokenizer.

    With adapters and `merge`, the merged weights; else the adapters alone, for peft to load.
    """
    model: Any = policy.causal_lm
    if merge and model is not policy.base:
        model = model.merge_and_unload()  # the base itself, its weights changed
    base = policy.base
    base.config.dtype = policy.compute_dtype
    if model is base:
        state = _cast(model.state_dict(), policy.compute_dtype)
        model.save_pretrained(folder, state_dict=state)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`; tensors that are tied stay tied."""
    made: dict[int, Tensor] = {}
    for value in state.values():
        if value.data_ptr() not in made:
            made[value.data_ptr()] = value.to(dtype) if value.is_floating_point() else value
    return {name: made[value.data_ptr()] for name, value in state.items()}
