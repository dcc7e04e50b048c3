"""Export of the policy in Hugging Face format."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from fastpref import distributed
from fastpref.model import fsdp
from fastpref.model.lora import TRAINED_ADAPTER, merges
from fastpref.model.policy import Policy
from fastpref.model.reward_policy import HEAD, RewardPolicy

FILE_SIZE = "5GB"  # largest file of an export
# What turns images and sounds into inputs of a model that also reads text.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@torch.no_grad()
def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Write the model in Hugging Face format: safetensors in the compute dtype, and the tokenizer.

    The policy does not change, so training can go on. A collective call for a sharded model, of
    which rank 0 gathers one weight after the other into main memory.

    merge: for a policy with an adapter, write the merged model; otherwise only the adapter, which
        peft loads.
    """
    # What rank 0 does below reshards its weights alone, and the next forward pass needs all ranks.
    policy.to_shards()
    model: Any = policy.causal_lm
    if merge or model is policy.base:
        # Without shards every rank has full copies of the weights to write.
        if policy.sharded or distributed.is_main_process():
            weights = _merged_weights(policy)
        if distributed.is_main_process():
            _write(policy, weights, folder)
    elif distributed.is_main_process():
        model.save_pretrained(folder, selected_adapters=[TRAINED_ADAPTER])
        if isinstance(policy, RewardPolicy):
            _add_head(policy, folder)
    if distributed.is_main_process():
        tokenizer.save_pretrained(folder)


def _merged_weights(policy: Policy) -> dict[str, Tensor]:
    """Merged weights and persistent buffers by name, tied ones once, on the CPU of rank 0."""
    functions = merges(policy)
    weights: dict[str, Tensor] = {}
    for name, weight in fsdp.base_weights(policy).items():
        full = fsdp.full_tensor(weight)
        if distributed.is_main_process():
            merged = functions[name](full) if name in functions else full
            weights[name] = merged.to("cpu", _exported_dtype(policy, name, merged))
    return weights


def _add_head(policy: RewardPolicy, folder: Path) -> None:
    """Add the trained head to an adapter, as a module that peft saves in full."""
    weights_file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights = load_file(weights_file)
    for name, tensor in policy.base.get_submodule(HEAD).state_dict().items():
        weights[f"base_model.model.{HEAD}.{name}"] = tensor.cpu()
    save_file(weights, weights_file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    config |= {"exclude_modules": None, "auto_mapping": None}
    if isinstance(config["target_modules"], list):  # peft lists the head among all linear layers
        config["target_modules"] = [name for name in config["target_modules"] if name != HEAD]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _exported_dtype(policy: Policy, name: str, weight: Tensor) -> torch.dtype:
    """The compute dtype, or fp32 for weights that transformers always keeps in it."""
    if not weight.is_floating_point():
        return weight.dtype
    kept: Any = policy.base._keep_in_fp32_modules_strict or ()
    if any(part in name for part in kept):
        return torch.promote_types(policy.compute_dtype, torch.float32)
    return policy.compute_dtype


def _write(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights through an empty model without adapters and quantization, and its configs."""
    base: Any = policy.base
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = type(base)._from_config(config, dtype=policy.compute_dtype)
    plain.tie_weights()
    if hasattr(base, "generation_config"):  # classifiers have none
        plain.generation_config = base.generation_config
    # Conversions to reverse, so that names and shapes are those of the files that were read.
    if not policy.quantized and getattr(base, "_weight_conversions", None) is not None:
        plain._weight_conversions = base._weight_conversions
    plain.save_pretrained(folder, state_dict=weights, max_shard_size=FILE_SIZE)
    _copy_processor(base.name_or_path, folder)


def _copy_processor(source: str, folder: Path) -> None:
    """Copy the files of a model's processor from its folder or from the cache of the Hub."""
    for name in _PROCESSOR_FILES if source else ():
        path = cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None:
            shutil.copyfile(path, folder / name)
