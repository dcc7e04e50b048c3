"""Adapters: a few trained weights beside the frozen ones of a model.

A fresh adapter adds zero, and the reference is the model without it. One that was loaded, or that
computes in another way (DoRA), is its own reference: a frozen copy of it, under another name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref import config as configs
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError, cannot_load

TRAINED, REFERENCE = "default", "reference"
_ADDS_ZERO = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # of a fresh adapter
_BESIDE = ("modules_to_save", "trainable_token_indices", "layer_replication")
_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change it


def add_adapter(
    causal_lm: PreTrainedModel, adapter: configs.Adapter, with_reference: bool, sharded: bool
) -> nn.Module:
    """The model with an adapter, a fresh one or that of `adapter.path`; `initialize` fills it.

    with_reference: make room for what it computes when it is loaded, for `as_loaded`. sharded: the
    model will be. Raises ModelError for targets that the model lacks, and for an adapter that
    cannot be trained on.
    """
    import peft

    option = "adapter.path" if adapter.path else "adapter.target_modules"
    described = _read(adapter.path) if adapter.path else _fresh(adapter)
    if sharded and described.use_dora:
        raise ModelError(
            "adapter.dora: takes the norms of whole weights, and these are sharded over the ranks; "
            "train on one rank, or with adapter.quantize"
        )
    try:
        wrapped: Any = peft.get_peft_model(causal_lm, described)
    except ValueError as error:
        source = adapter.path or str(adapter.target_modules)
        raise ModelError(cannot_load(option, source, error)) from None
    _check_ends(causal_lm, option)
    if with_reference and (adapter.path or described.use_dora):
        frozen = replace(described, lora_dropout=0.0, inference_mode=True, init_lora_weights=False)
        wrapped.add_adapter(REFERENCE, frozen)
    return wrapped


def initialize(policy: Policy, adapter: configs.Adapter, seed: int) -> None:
    """Give the adapter its values, the same on every rank, where its weights lie now.

    Raises ModelError where those at `adapter.path` are not of this model.
    """
    import peft

    model: Any = policy.causal_lm
    if adapter.path:
        _fill(model, adapter.path)
        policy.fresh_adapter = False
    else:
        torch.manual_seed(seed)
        for _, layer in _layers(policy.base):
            layer.reset_lora_parameters(TRAINED, True)
    if REFERENCE in model.peft_config:
        values = peft.get_peft_model_state_dict(model, adapter_name=TRAINED)
        peft.set_peft_model_state_dict(model, values, adapter_name=REFERENCE)


@contextmanager
def as_loaded(policy: Policy) -> Iterator[None]:
    """Within it, the policy computes what it did before its first update."""
    model: Any = policy.causal_lm
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def weights_as_loaded(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all that decides the policy's log-probs before its first update.

    A fresh adapter is left out, but for the norms that DoRA takes of the weights; of one that was
    loaded, its scales count too.
    """
    for name, weight in policy.state_dict().items():
        parts = name.split(".")
        fresh = policy.fresh_adapter and not set(_ADDS_ZERO).isdisjoint(parts)
        if not fresh and REFERENCE not in parts:
            yield name, weight
    if not policy.fresh_adapter:
        for name, layer in _layers(policy.base):
            scale = layer.scaling[TRAINED]
            yield f"{name}.scaling", torch.tensor(scale, dtype=torch.float64)


def merged_updates(policy: Policy) -> dict[str, Callable[[], Tensor]]:
    """For each weight of the base that has an adapter, what merging adds to it."""
    return {
        f"{name}.weight": partial(layer.get_delta_weight, TRAINED)
        for name, layer in _layers(policy.base)
    }


def merged(policy: Policy) -> PreTrainedModel:
    """The base itself with the adapter's update in its weights, none of them in 4 bits."""
    import peft

    model: Any = policy.causal_lm
    if policy.quantized:
        described = model.peft_config[TRAINED]
        values = peft.get_peft_model_state_dict(model, adapter_name=TRAINED)
        base = model.unload()
        base.dequantize(policy.compute_dtype)
        model = peft.get_peft_model(base, described)
        peft.set_peft_model_state_dict(model, values)
    return model.merge_and_unload()


def _fresh(adapter: configs.Adapter) -> Any:
    import peft

    return peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )


def _read(path: str) -> Any:
    """The description of the adapter in a folder or on the Hub."""
    import peft

    try:
        described: Any = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # peft, json and the Hub raise unrelated types
        raise ModelError(cannot_load("adapter.path", path, error)) from None
    if not isinstance(described, peft.LoraConfig):
        kind = described.peft_type.value
        raise ModelError(
            f"adapter.path: {path} is of type {kind}; only LORA can be trained on, name such"
        )
    odd = [name for name in _BESIDE if getattr(described, name, None)]
    if described.bias != "none":
        odd.append("bias")
    if str(described.init_lora_weights).startswith(_OF_THE_BASE):
        odd.append("init_lora_weights")
    if odd:
        raise ModelError(
            f"adapter.path: {path} changes weights of the model beside its own ({odd[0]}: "
            f"{getattr(described, odd[0])}); merge it into the model, and train a fresh adapter"
        )
    described.inference_mode = False
    described.base_model_name_or_path = None  # peft writes where the model is now
    return described


def _check_ends(causal_lm: PreTrainedModel, option: str) -> None:
    """Refuse adapters where the head could not see them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = type(causal_lm).__name__
    if isinstance(causal_lm.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            f"{option}: the head of {name} must be a plain linear layer, whose weight is all that "
            "its log-probs are made of, and this adapter is on it; leave it out"
        )
    tied = causal_lm.config.get_text_config().tie_word_embeddings
    if tied and isinstance(causal_lm.get_input_embeddings(), BaseTunerLayer):
        raise ModelError(
            f"{option}: the embeddings of {name} are its head too, which an adapter on them would "
            "not change; leave them out"
        )


def _fill(wrapped: Any, path: str) -> None:
    """Load an adapter's weights, all of them and no others."""
    import peft

    try:
        values = peft.load_peft_weights(path, device="cpu")
        result: Any = peft.set_peft_model_state_dict(wrapped, values)
    except Exception as error:  # peft, safetensors and torch raise unrelated types
        reason = str(error).strip().splitlines()[-1].strip()  # of many lines, the last is a shape
        raise ModelError(
            f"adapter.path: {path} does not fit the model: {reason[:300]}; name one that was "
            "trained on it"
        ) from None
    wanted = peft.get_peft_model_state_dict(wrapped, adapter_name=TRAINED)
    odd = [*sorted(wanted.keys() - values.keys()), *result.unexpected_keys]
    if odd:
        raise ModelError(
            f"adapter.path: {path} does not fit the model (differs in {odd[0]}); name one that was "
            "trained on it"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that have an adapter, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield name, module
