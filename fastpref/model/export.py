"""Write the policy in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.model import fsdp
from fastpref.model.lora import TRAINED, merged, merged_updates
from fastpref.model.policy import Policy

FILE_BYTES = 5 * 10**9  # of an export's files, as transformers makes them


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Write the model in Hugging Face format: safetensors in the compute dtype, and the tokenizer.

    With adapters and `merge`, the merged weights; else the adapters alone, for peft to load.
    """
    model: Any = policy.causal_lm
    if policy.sharded and (merge or model is policy.base):
        _export_shards(policy, folder)
        if distributed.is_main_process():
            tokenizer.save_pretrained(folder)
        return
    if not distributed.is_main_process():  # what is to be written is whole on every rank
        return
    if merge and model is not policy.base:
        model = merged(policy)  # the base itself, its weights changed
    base = policy.base
    base.config.dtype = policy.compute_dtype
    if model is base:
        state = _cast(model.state_dict(), policy.compute_dtype)
        model.save_pretrained(folder, state_dict=state)
    else:
        model.save_pretrained(folder, selected_adapters=[TRAINED])
    tokenizer.save_pretrained(folder)


def _export_shards(policy: Policy, folder: Path) -> None:
    """Write merged weights file by file, of which the first rank holds one at a time.

    Every rank sends its shards of one weight after the other.
    """
    base: Any = policy.base
    weights = fsdp.base_weights(policy)
    updates = merged_updates(policy)
    files = _files(weights, policy.compute_dtype.itemsize)
    for number, names in enumerate(files, 1):
        held: dict[str, Tensor] = {}
        for name in names:
            weight = fsdp.full_tensor(weights[name])
            if name in updates:
                weight = weight + updates[name]().to(weight.dtype)
            if distributed.is_main_process():
                dtype = policy.compute_dtype if weight.is_floating_point() else weight.dtype
                held[name] = weight.to("cpu", dtype)
        if distributed.is_main_process():
            folder.mkdir(exist_ok=True)
            save_file(held, folder / _file_name(number, len(files)), metadata={"format": "pt"})
    if not distributed.is_main_process():
        return
    if len(files) > 1:
        where = {n: _file_name(k, len(files)) for k, names in enumerate(files, 1) for n in names}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    base.config.dtype = policy.compute_dtype
    base.config.save_pretrained(folder)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _files(weights: dict[str, Tensor], itemsize: int) -> list[list[str]]:
    """Names of weights, in files of `FILE_BYTES` at most or of a single weight."""
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
    """Floating-point tensors in `dtype`; tensors that are tied stay tied."""
    made: dict[int, Tensor] = {}
    for value in state.values():
        if value.data_ptr() not in made:
            made[value.data_ptr()] = value.to(dtype) if value.is_floating_point() else value
    return {name: made[value.data_ptr()] for name, value in state.items()}
