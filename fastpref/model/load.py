"""Load the policy: a pretrained Hugging Face model, or one with random weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from fastpref.config import Adapter, Model, Parallel, Training
from fastpref.model import fsdp
from fastpref.model.layer_kernels import use_kernels
from fastpref.model.lora import add_adapter, initialize
from fastpref.model.policy import Policy
from fastpref.model.pretrained import auto_model, read_on_main_process, read_pretrained
from fastpref.model.quantize import check_quantization, load_in_4bit, reload_in_4bit
from fastpref.model.recomputation import recompute
from fastpref.model.reward_adapter import is_classifier
from fastpref.model.reward_policy import RewardPolicy
from fastpref.utils.errors import ModelError, UserError, cannot_load, shown
from fastpref.utils.optional_packages import require


def announce_code(model: Model, say: Callable[[str], None]) -> None:
    """Note that Python code of the model runs here, if the config trusts it."""
    if model.trust_remote_code:
        source = model.path or model.tokenizer
        say(f"note: model.trust_remote_code: Python code that comes with {source} is run here")


def load_policy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    training: Training,
    parallel: Parallel,
    *,
    adapter: Adapter | None = None,
    keep_initial_adapter: bool = False,
    copy_adapter: bool = False,
    of_rewards: bool = False,
) -> Policy:
    """Load or build the model, add adapters, shard it over the ranks, and verify its head.

    Trained weights are stored in fp32 or fp64 and cast by autocast; frozen weights are stored in
    the compute dtype. For a sharded model, rank 0 reads the weights and the others their shards.

    training: its seed, activation checkpointing and compilation are used.
    keep_initial_adapter: also add a frozen copy of the adapter, for `reference: adapter`.
    copy_adapter: add it for a new adapter, too, for a reference that follows the policy.
    of_rewards: load a sequence classifier with one label, see `RewardPolicy`; the tokenizer has a
        padding token. Beside an adapter its head is trained, too.

    Raises ModelError if the model or adapter cannot be loaded.
    """
    mesh = fsdp.make_mesh(parallel, device)
    in_4bit = adapter is not None and adapter.quantize is not None
    if in_4bit:
        # 4-bit weights cannot be sharded.
        mesh = None
    compute_dtype = getattr(torch, model.dtype)
    stored_dtype = compute_dtype
    if adapter is None:
        stored_dtype = torch.promote_types(compute_dtype, torch.float32)
    torch.manual_seed(training.seed)
    causal_lm, weights = _build(
        model, tokenizer, stored_dtype, mesh is not None, device if in_4bit else None, of_rewards
    )
    _check_vocabulary(causal_lm, tokenizer)
    wrapped: nn.Module = causal_lm
    if adapter is not None:
        causal_lm.requires_grad_(False)
        wrapped = add_adapter(
            causal_lm,
            adapter,
            keep_initial_adapter,
            sharded=mesh is not None,
            always_copy=copy_adapter,
            of_rewards=of_rewards,
        )
    policy = RewardPolicy(wrapped, compute_dtype) if of_rewards else Policy(wrapped, compute_dtype)
    if isinstance(policy, RewardPolicy) and adapter is not None:
        policy.train_head()
    use_kernels(policy, model, training, device)
    if training.activation_checkpointing != "auto":
        recompute(policy, training.activation_checkpointing)
    if training.compile:
        for block in policy.blocks():
            block.compile()
    if mesh is None:
        policy.to(device)
    else:
        fsdp.shard(policy, mesh, parallel)
        fsdp.materialize(policy, torch.device("cpu") if parallel.cpu_offload else device)
        if model.path is not None:
            fsdp.load(policy, weights)
    if adapter is not None:
        initialize(policy, adapter, training.seed)
    try:
        policy.check_head()
        policy.check_trunk()
        policy.check_causal()
    except UserError:
        raise
    # For example, a width that is no multiple of the number of attention heads.
    except Exception as error:
        raise ModelError(cannot_load("model", type(causal_lm).__name__, error)) from None
    return policy.train()


def _check_vocabulary(causal_lm: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a tokenizer with ids beyond the embedding."""
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > rows:
        raise ModelError(
            f"model: the tokenizer has {tokens:,} tokens but the embedding only {rows:,} rows; "
            "set model.tokenizer to the one of the model"
        )


def _build(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    sharded: bool,
    in_4bit_on: torch.device | None,
    of_rewards: bool,
) -> tuple[Any, dict[str, Tensor]]:
    """Build the model on the CPU, or in 4 bits on a device.

    sharded: leave the weights of a pretrained model on the meta device, and return them by name on
        rank 0; buffers are allocated.
    of_rewards: as in `load_policy`.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    if model.attn_implementation == "flash_attention_2":
        require("flash-attn", "model.attn_implementation: flash_attention_2")
    special_tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    defaults = {"vocab_size": len(tokenizer)}
    defaults |= {name: getattr(tokenizer, name) for name in special_tokens}
    with naming_the_model(model):
        config = model_config(model, defaults)
        if not of_rewards:
            _check_language_model(model, config)
        else:
            check_one_label(model, config)
            config.num_labels = 1
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if model.path is None:
            causal_lm = auto_model(of_rewards).from_config(config, **options)
            if in_4bit_on is not None:
                causal_lm = reload_in_4bit(causal_lm, in_4bit_on, options, of_rewards)
            return causal_lm, {}
        path = model.path
        check_quantization(path, config, allow_nf4=in_4bit_on is not None)
        if in_4bit_on is not None:
            return load_in_4bit(path, config, in_4bit_on, options, of_rewards), {}
        if not sharded:
            return read_pretrained(path, config, options, of_rewards), {}

    def read() -> Any:
        with naming_the_model(model):
            return read_pretrained(path, config, options, of_rewards)

    return read_on_main_process(read, config, options, of_rewards)


def _check_language_model(model: Model, config: Any) -> None:
    """Raise ModelError for a classifier; tied embeddings would make a language model of it."""
    if model.path is not None and is_classifier(config):
        raise ModelError(
            f"model.path: {model.path} is a sequence classifier, such as a reward model, and no "
            "language model; use another model"
        )


def check_one_label(model: Model, config: Any) -> None:
    """Raise ModelError for a classifier with several labels, whose head is no reward."""
    if model.path is not None and is_classifier(config) and config.num_labels != 1:
        raise ModelError(
            f"model.path: {model.path} is a classifier with {config.num_labels} labels, and a "
            "reward model has one; use a reward model, or a language model for a new head"
        )


@contextmanager
def naming_the_model(model: Model) -> Iterator[None]:
    """Context manager that turns exceptions of transformers and the Hub into a ModelError."""
    try:
        yield
    except UserError:
        raise
    # The libraries raise unrelated types.
    except Exception as error:
        raise ModelError(cannot_load("model", model.path or shown(model.config), error)) from None


def model_config(model: Model, defaults: dict[str, Any]) -> Any:
    """Hugging Face config of a model, without dropout.

    defaults: values for keys that the config of a model with random weights does not set.

    Raises ModelError for an unknown key in such a config.
    """
    if model.path is None:
        return without_dropout(_random_config(dict(model.config or {}), defaults))
    return without_dropout(
        AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    )


def _random_config(values: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """Build a Hugging Face config from a mapping; raises ModelError for unknown keys."""
    model_type = values.pop("model_type")
    known_keys = {*AutoConfig.for_model(model_type).to_dict(), "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known_keys:
            close = difflib.get_close_matches(key, known_keys, n=1)
            guess = f"did you mean {close[0]}?" if close else "remove it"
            raise ModelError(f"model.config.{key}: unknown key for {model_type}; {guess}")
    return AutoConfig.for_model(model_type, **{**defaults, **values})


def without_dropout(config: Any) -> Any:
    """Set every dropout of a config to 0, so that equal weights give equal log-probs."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return config
