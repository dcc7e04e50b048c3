"""Export of the policy in Hugging Face format."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.model import fsdp
from fastpref.model.lora import TRAINED_ADAPTER, adapter_updates, merged_weights
from fastpref.model.policy import Policy

FILE_BYTES = 5 * 10**9  # largest file of an export, as in transformers


@torch.no_grad()
def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Write the model in Hugging Face format: safetensors in the compute dtype, and the tokenizer.

    The policy does not change, so training can go on. A collective call for a sharded model.

    merge: for a policy with an adapter, write the merged model; otherwise only the adapter, which
        peft loads.
    """
    model: Any = policy.causal_lm
    if policy.sharded and (merge or model is policy.base):
        _export_shards(policy, folder)
        if distributed.is_main_process():
            tokenizer.save_pretrained(folder)
        return
    # Every rank has full copies of the weights to write.
    if not distributed.is_main_process():
        return
    if merge or model is policy.base:
        _export_full(policy, folder)
    else:
        model.save_pretrained(folder, selected_adapters=[TRAINED_ADAPTER])
    tokenizer.save_pretrained(folder)


def _export_full(policy: Policy, folder: Path) -> None:
    """Write the merged weights through an empty model without adapters and quantization."""
    base: Any = policy.base
    state = fsdp.base_weights(policy)
    if policy.causal_lm is not base:
        # One at a time, since the device may have no room for a second model.
        state |= ((name, weight.to("cpu")) for name, weight in merged_weights(policy))
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = type(base)._from_config(config, dtype=policy.compute_dtype)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    plain.save_pretrained(folder, state_dict=_cast(state, policy.compute_dtype))


def _export_shards(policy: Policy, folder: Path) -> None:
    """Write the merged weights of a sharded model; rank 0 holds one file in memory at a time.

    All ranks gather one weight after the other.
    """
    base: Any = policy.base
    weights = fsdp.base_weights(policy)
    updates = adapter_updates(policy)
    files = _split_into_files(weights, policy.compute_dtype.itemsize)
    for number, names in enumerate(files, 1):
        tensors: dict[str, Tensor] = {}
        for name in names:
            weight = fsdp.full_tensor(weights[name])
            if name in updates:
                weight = weight + updates[name]().to(weight.dtype)
            if distributed.is_main_process():
                dtype = policy.compute_dtype if weight.is_floating_point() else weight.dtype
                tensors[name] = weight.to("cpu", dtype)
        if distributed.is_main_process():
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / _file_name(number, len(files)), metadata={"format": "pt"})
    if not distributed.is_main_process():
        return
    if len(files) > 1:
        weight_map = {
            name: _file_name(number, len(files))
            for number, names in enumerate(files, 1)
            for name in names
        }
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    base.config.dtype = policy.compute_dtype
    base.config.save_pretrained(folder)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _split_into_files(weights: dict[str, Tensor], itemsize: int) -> list[list[str]]:
    """Weight names per file; a file holds at most `FILE_BYTES`, or a single weight."""
    files: list[list[str]] = []
    room = 0
    for name, weight in weights.items():
        size = weight.numel() * itemsize
        if size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    return files


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on the CPU, floating-point ones in `dtype`; tied tensors stay tied."""
    casts: dict[int, Tensor] = {}
    for value in state.values():
        if value.data_ptr() not in casts:
            target = dtype if value.is_floating_point() else value.dtype
            casts[value.data_ptr()] = value.to("cpu", target)
    return {name: casts[value.data_ptr()] for name, value in state.items()}
