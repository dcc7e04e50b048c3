"""LoRA adapters of peft: a few trained weights on top of a frozen base model.

The output of a new LoRA adapter is zero, so the reference is the model without it. For an adapter
that was loaded, and for DoRA, the reference is a frozen copy of the adapter under another name.
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
from fastpref.model.reward_adapter import check_head_of_adapter, has_only_heads
from fastpref.model.reward_policy import HEAD, RewardPolicy
from fastpref.utils.errors import ModelError, cannot_load

# Names of the adapters in peft's model.
TRAINED_ADAPTER, REFERENCE_ADAPTER = "default", "reference"
# Parameters whose product is zero in a new adapter.
_LORA_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# Options of peft that train or change weights of the base.
_BASE_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication")
# Initializations of peft that change weights of the base.
_BASE_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_adapter(
    causal_lm: PreTrainedModel,
    adapter: configs.Adapter,
    with_reference: bool,
    sharded: bool,
    always_copy: bool = False,
    of_rewards: bool = False,
) -> nn.Module:
    """Wrap the model with a new adapter or that of `adapter.path`; `initialize` sets its values.

    with_reference: also add the frozen copy for `as_reference`, unless the reference is the base.
    always_copy: add it even then, for a reference that follows the trained adapter.
    sharded: whether the model will be sharded.
    of_rewards: the model is a sequence classifier, whose head gets no adapter.

    Raises ModelError if the model lacks a target module or the adapter cannot be trained.
    """
    import peft

    field = "adapter.path" if adapter.path else "adapter.target_modules"
    _check_parameters(causal_lm, adapter)
    config = _read_config(adapter.path, of_rewards) if adapter.path else _new_config(adapter)
    if of_rewards:
        if adapter.path:
            check_head_of_adapter(config, causal_lm.config, adapter.path)
        # peft would replace the head of a classifier by a copy under another name.
        config.task_type, config.exclude_modules, config.modules_to_save = None, [HEAD], None
    if sharded and config.use_dora:
        raise ModelError(
            "adapter.dora: needs the norms of full weights, and these are sharded over the ranks; "
            "train on one rank, or with adapter.quantize"
        )
    try:
        wrapped: Any = peft.get_peft_model(causal_lm, config)
    except ValueError as error:
        raise ModelError(_refusal(adapter, field, error)) from None
    _check_head_is_plain(causal_lm, field)
    _check_layers(causal_lm, field, adapter)
    if always_copy or (with_reference and (adapter.path or config.use_dora)):
        frozen = replace(config, lora_dropout=0.0, inference_mode=True, init_lora_weights=False)
        wrapped.add_adapter(REFERENCE_ADAPTER, frozen)
    return wrapped


def _refusal(adapter: configs.Adapter, field: str, error: ValueError) -> str:
    """Message for an exception of peft."""
    for option, name in (("lora_dropout", "dropout"), ("use_dora", "dora")):
        if option in str(error) and not adapter.path:
            return (
                f"adapter.{name}: adapters on weights outside linear layers, such as fused "
                "experts, cannot have it; remove it, or leave these weights out of "
                "adapter.target_modules and adapter.target_parameters"
            )
    return cannot_load(field, adapter.path or str(adapter.target_modules), error)


def initialize(policy: Policy, adapter: configs.Adapter, seed: int) -> None:
    """Set the adapter's values on their device; they are the same on every rank.

    Raises ModelError if the weights at `adapter.path` do not fit the model.
    """
    import peft

    model: Any = policy.causal_lm
    if adapter.path:
        values = _read_weights(adapter.path)
        if isinstance(policy, RewardPolicy):
            policy.load_head(values, adapter.path)
        _load_weights(model, values, adapter.path)
        policy.fresh_adapter = False
    else:
        torch.manual_seed(seed)
        for _, layer in _adapted_layers(policy.base):
            layer.reset_lora_parameters(TRAINED_ADAPTER, True)
    if REFERENCE_ADAPTER in model.peft_config:
        values = peft.get_peft_model_state_dict(model, adapter_name=TRAINED_ADAPTER)
        peft.set_peft_model_state_dict(model, values, adapter_name=REFERENCE_ADAPTER)


@contextmanager
def as_reference(policy: Policy) -> Iterator[None]:
    """Context manager in which the policy computes what it did before its first update."""
    model: Any = policy.causal_lm
    if REFERENCE_ADAPTER not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED_ADAPTER)


@contextmanager
def without_adapter(policy: Policy) -> Iterator[None]:
    """Context manager in which the policy computes what its base does."""
    model: Any = policy.causal_lm
    with model.disable_adapter():
        yield


def reference_copies(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors of the frozen copy of the adapter and those of the trained one, by name.

    Writing to the first ones changes what `as_reference` computes.
    """
    tensors = dict(policy.named_parameters())
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if REFERENCE_ADAPTER in parts:
            trained = [TRAINED_ADAPTER if part == REFERENCE_ADAPTER else part for part in parts]
            copies[name] = tensor.detach(), tensors[".".join(trained)].detach()
    return copies


def reference_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all tensors that determine the log-probs before the first update.

    The matrices of a new adapter are left out, since their product is zero; the magnitudes of DoRA
    are not. For a loaded adapter the scales are included.
    """
    for name, weight in policy.state_dict().items():
        parts = name.split(".")
        is_zero = policy.fresh_adapter and not set(_LORA_MATRICES).isdisjoint(parts)
        if not is_zero and REFERENCE_ADAPTER not in parts:
            yield name, weight
    if not policy.fresh_adapter:
        for name, layer in _adapted_layers(policy.base):
            scale = layer.scaling[TRAINED_ADAPTER]
            yield f"{name}.scaling", torch.tensor(scale, dtype=torch.float64)


def merges(policy: Policy) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from a full weight or bias of the base to its value in the merged model, by name.

    All others are equal in both. 4-bit weights are dequantized, with an adapter or without one.
    The policy does not change.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    adapters = dict(_adapted_layers(policy.base))
    for name, module in policy.base.named_modules():
        plain_name = name.replace(".base_layer", "")
        weight: Any = getattr(module, "weight", None)
        if name in adapters:
            parameter = f"{plain_name}.{_adapted_parameter(module)}"
            functions[parameter] = partial(_merged, module, policy.compute_dtype)
            if adapters[name].lora_bias.get(TRAINED_ADAPTER):
                functions[f"{plain_name}.bias"] = partial(_merged_bias, module)
        elif hasattr(weight, "quant_state") and not name.endswith(".base_layer"):
            functions[f"{name}.weight"] = partial(_dequantized, weight, policy.compute_dtype)
    return functions


def adapted_weights(policy: Policy) -> list[Tensor]:
    """Weights of the base that have an adapter."""
    return [
        getattr(layer.get_base_layer(), _adapted_parameter(layer))
        for _, layer in _adapted_layers(policy.base)
    ]


def _adapted_parameter(layer: Any) -> str:
    """Name in its layer of the weight that has the adapter."""
    name: str = getattr(layer, "parameter_name", "weight")
    return name


def _merged(layer: Any, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Weight of a layer with its adapter merged, a new tensor."""
    stored = getattr(layer.get_base_layer(), _adapted_parameter(layer))
    in_4bit = hasattr(stored, "quant_state")
    if in_4bit:
        weight = _dequantized(stored, dtype)
    if TRAINED_ADAPTER not in layer.lora_magnitude_vector:
        # Adapters of a sharded model may be offloaded to the CPU.
        update = layer.get_delta_weight(TRAINED_ADAPTER).to(weight.device)
        return (weight + update).to(weight.dtype)
    if in_4bit:  # always a linear layer
        total = weight + layer.get_delta_weight(TRAINED_ADAPTER)
        magnitude = layer.lora_magnitude_vector[TRAINED_ADAPTER].weight
        scale = magnitude / torch.linalg.norm(total, dim=1)
        return (scale[:, None] * total).to(weight.dtype)
    merged: Tensor = layer.lora_variant[TRAINED_ADAPTER].merge_safe(layer, TRAINED_ADAPTER, weight)
    layer._cache_pop(f"{TRAINED_ADAPTER}-weight_norm")
    return merged


def _merged_bias(layer: Any, bias: Tensor) -> Tensor:
    update = layer.lora_B[TRAINED_ADAPTER].bias * layer.scaling[TRAINED_ADAPTER]
    return (bias + update).to(bias.dtype)


def _dequantized(stored: Any, dtype: torch.dtype, _packed: Tensor | None = None) -> Tensor:
    """A 4-bit weight in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(stored.data, stored.quant_state)
    return dequantized.to(dtype)


def _new_config(adapter: configs.Adapter) -> Any:
    import peft

    return peft.LoraConfig(
        r=adapter.r,
        lora_alpha=float(adapter.alpha),  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        target_parameters=adapter.target_parameters,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )


def _read_config(path: str, of_rewards: bool) -> Any:
    """Read the peft config of an adapter in a folder or on the Hub; refuse unsupported ones.

    of_rewards: the adapter may have a head.
    """
    import peft

    try:
        config: Any = peft.PeftConfig.from_pretrained(path)
    # peft, json and the Hub raise unrelated types.
    except Exception as error:
        raise ModelError(cannot_load("adapter.path", path, error)) from None
    if not isinstance(config, peft.LoraConfig):
        kind = config.peft_type.value
        raise ModelError(
            f"adapter.path: {path} is of type {kind}, and only LORA can be trained; use another"
        )
    unsupported = [name for name in _BASE_OPTIONS if getattr(config, name, None)]
    if of_rewards and has_only_heads(config):
        unsupported.remove("modules_to_save")
    if config.bias != "none":
        unsupported.append("bias")
    if str(config.init_lora_weights).startswith(_BASE_INITIALIZATIONS):
        unsupported.append("init_lora_weights")
    if unsupported:
        option = unsupported[0]
        raise ModelError(
            f"adapter.path: {path} also changes weights of the base model ({option}: "
            f"{getattr(config, option)}); merge it into the model and train a new adapter"
        )
    config.inference_mode = False
    # On saving, peft fills in the path of the present base.
    config.base_model_name_or_path = None
    return config


def _check_head_is_plain(causal_lm: PreTrainedModel, field: str) -> None:
    """Refuse adapters on the head and on tied embeddings: the fused head ignores them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = type(causal_lm).__name__
    if isinstance(causal_lm.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            f"{field}: the head of {name} must be a plain linear layer, since log-probs are "
            "computed from its weight alone; remove the adapter on it"
        )
    tied = causal_lm.config.get_text_config().tie_word_embeddings
    if tied and isinstance(causal_lm.get_input_embeddings(), BaseTunerLayer):
        raise ModelError(
            f"{field}: the embeddings of {name} are also its head, which an adapter on them would "
            "not change; remove the adapter on them"
        )


def _check_parameters(causal_lm: PreTrainedModel, adapter: configs.Adapter) -> None:
    """Refuse names of `adapter.target_parameters` that no weight has, which peft passes over."""
    names = [f".{name}" for name, _ in causal_lm.named_parameters()]
    for target in adapter.target_parameters or ():
        if not any(name.endswith(f".{target}") for name in names):
            raise ModelError(
                f"adapter.target_parameters: {type(causal_lm).__name__} has no weight {target}; "
                "write the end of a weight's name, without the number of the layer"
            )


def _check_layers(causal_lm: PreTrainedModel, field: str, adapter: configs.Adapter) -> None:
    """Refuse adapters that cannot be merged after training."""
    for name, layer in _adapted_layers(causal_lm):
        parameter = f"{name.replace('.base_layer', '')}.{_adapted_parameter(layer)}"
        has_bias = layer.lora_bias.get(TRAINED_ADAPTER)
        if has_bias and adapter.merge and layer.get_base_layer().bias is None:
            raise ModelError(
                f"{field}: the adapter of {parameter} has a bias (lora_bias), and the layer has "
                "none to merge it into; set adapter.merge=false"
            )


def _read_weights(path: str) -> dict[str, Tensor]:
    """Weights of an adapter in a folder or on the Hub, on the CPU; raises ModelError."""
    import peft

    try:
        values: dict[str, Tensor] = peft.load_peft_weights(path, device="cpu")
    # peft, safetensors, torch and the Hub raise unrelated types.
    except Exception as error:
        raise ModelError(cannot_load("adapter.path", path, error)) from None
    return values


def _load_weights(wrapped: Any, values: dict[str, Tensor], path: str) -> None:
    """Load an adapter's weights; raise ModelError if one is missing, unexpected or misshaped."""
    import peft

    try:
        result: Any = peft.set_peft_model_state_dict(wrapped, values)
    # peft, safetensors and torch raise unrelated types.
    except Exception as error:
        # The last line of torch's message names a weight and its shapes.
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"adapter.path: {path} does not fit the model: {reason[:300]}; use one that was "
            "trained on it"
        ) from None
    expected = peft.get_peft_model_state_dict(wrapped, adapter_name=TRAINED_ADAPTER)
    mismatched = [*sorted(expected.keys() - values.keys()), *result.unexpected_keys]
    if mismatched:
        raise ModelError(
            f"adapter.path: {path} does not fit the model (differs in {mismatched[0]}); use one "
            "that was trained on it"
        )


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers that have an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield name, module
