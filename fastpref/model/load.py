"""Hugging Face folders in and out: the policy as it is loaded, the export."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from fastpref import config as configs
from fastpref.model import fsdp
from fastpref.model.liger import use_liger
from fastpref.model.lora import add_adapter, initialize
from fastpref.model.policy import Policy
from fastpref.model.quantize import check_quantization, load_in_4bit, reloaded_in_4bit
from fastpref.utils.errors import ModelError, UserError, cannot_load, shown
from fastpref.utils.optional_packages import require


def announce_code(model: configs.Model, say: Callable[[str], None]) -> None:
    """Say that code which is not fastpref's is run, where the config trusts it."""
    if model.trust_remote_code:
        source = model.path or model.tokenizer
        say(f"note: model.trust_remote_code: Python code that comes with {source} is run here")


def load_policy(
    config: configs.Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Policy:
    """Load or build the model, add adapters, cut it over the ranks, and prove its head.

    Weights that are trained are kept in fp32 at least and cast by autocast; frozen ones are kept
    in the compute dtype. Of a pretrained model each rank reads its own shards alone. Raises
    ModelError in one line.
    """
    mesh = fsdp.make_mesh(config.parallel, device)
    in_4bit = config.adapter is not None and config.adapter.quantize is not None
    if in_4bit:
        mesh = None  # such weights cannot be cut: each rank has all of them
    compute_dtype = getattr(torch, config.model.dtype)
    full = config.adapter is None
    storage = torch.promote_types(compute_dtype, torch.float32) if full else compute_dtype
    torch.manual_seed(config.training.seed)
    causal_lm: Any = _build(
        config.model, tokenizer, storage, mesh is not None, device if in_4bit else None
    )
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > rows:
        raise ModelError(
            f"model: the tokenizer has {tokens:,} tokens but the embedding only {rows:,} rows; "
            "name the model's own in model.tokenizer"
        )
    liger = use_liger(causal_lm, config.model.kernels, device)
    wrapped: nn.Module = causal_lm
    if config.adapter is not None:
        causal_lm.requires_grad_(False)
        beside = config.reference_mode == "adapter"
        wrapped = add_adapter(causal_lm, config.adapter, beside, sharded=mesh is not None)
    policy = Policy(wrapped, compute_dtype)
    policy.kernels = "liger" if liger else "torch"
    if config.training.activation_checkpointing != "off":
        checkpoint_activations(
            policy, every=1 + (config.training.activation_checkpointing == "selective")
        )
    if config.training.compile:
        for block in policy.blocks():
            block.compile()
    if mesh is None:
        policy.to(device)
    else:
        fsdp.shard(policy, mesh, config.parallel)
        fsdp.materialize(policy, torch.device("cpu") if config.parallel.cpu_offload else device)
        if config.model.path is not None:
            fsdp.load(policy, _local_folder(config.model.path))
    if config.adapter is not None:
        initialize(policy, config.adapter, config.training.seed)
    try:
        policy.check_head()
    except UserError:
        raise
    except Exception as error:  # e.g. heads that do not divide the width, in a config of theirs
        raise ModelError(cannot_load("model", type(causal_lm).__name__, error)) from None
    return policy.train()


def checkpoint_activations(policy: Policy, every: int) -> None:
    causal_lm: Any = policy.base
    if not causal_lm.supports_gradient_checkpointing:
        raise ModelError(
            f"training.activation_checkpointing: {type(causal_lm).__name__} does not support "
            "it; set it to off"
        )
    # transformers 5.x is renaming the method; both take torch's checkpoint options first.
    older = causal_lm.gradient_checkpointing_enable
    enable = getattr(causal_lm, "activation_checkpointing_enable", older)
    enable({"use_reentrant": False})
    for number, block in enumerate(policy.blocks()):
        vars(block)["gradient_checkpointing"] = number % every == 0


def _local_folder(path: str) -> Path:
    """The folder of a model's safetensors files, from the Hub if it is not on this machine."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors"]))


def _build(
    model: configs.Model,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    empty: bool,
    in_4bit_on: torch.device | None,
) -> Any:
    """The model, on the CPU, or in 4 bits on a device.

    Of a pretrained one with `empty` the buffers alone, weights on the meta device.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    if model.attn_implementation == "flash_attention_2":
        require("flash-attn", "model.attn_implementation: flash_attention_2")
    try:
        if model.path is None:
            config = without_dropout(_random_config(dict(model.config or {}), tokenizer))
            built = AutoModelForCausalLM.from_config(config, **options)
            return built if in_4bit_on is None else reloaded_in_4bit(built, in_4bit_on, options)
        config = without_dropout(
            AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        )
        check_quantization(model.path, config, wanted=in_4bit_on is not None)
        if in_4bit_on is not None:
            return load_in_4bit(model.path, config, in_4bit_on, options)
        if empty:
            with init_empty_weights(include_buffers=False):
                causal_lm = AutoModelForCausalLM.from_config(config, **options)
            causal_lm.tie_weights()
            return causal_lm
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, output_loading_info=True, **options
        )
        causal_lm, found = loaded
        _check_complete(model.path, found["missing_keys"])
        return causal_lm
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise unrelated types
        source = model.path or shown(model.config)
        raise ModelError(cannot_load("model", source, error)) from None


def _check_complete(path: str, missing: Collection[str]) -> None:
    """Refuse weights that transformers would make up where a checkpoint lacks them."""
    if missing:
        raise ModelError(
            f"model.path: {path} has no weights named {min(missing)} (of {len(missing)} that are "
            "missing); are its files complete, and of this config.json?"
        )


def _random_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A Hugging Face config from a mapping; unknown keys are refused, not silently kept."""
    kind = values.pop("model_type")
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {close[0]}?" if close else "leave it out"
            raise ModelError(f"model.config.{key}: unknown key for {kind}; {guess}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = tokenizer.pad_token_id
    return AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **special, **values})


def without_dropout(config: Any) -> Any:
    """Log-probs of policy and reference are compared: the same weights must give the same ones."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return config
