"""Tiny checkpoints whose files differ from what config.json or the model's own names say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMALL = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3}
QWEN_EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TIED = {"tie_word_embeddings": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(folder: Path, kind: str, tokenizer: str, **options: Any) -> Path:
    """A model with random weights, as transformers saves it, and the tokenizer of a folder."""
    torch.manual_seed(0)
    values = {**SMALL, **options} if kind != "gemma3" else options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def make_all(root: Path, tokenizer: str) -> list[str]:
    """Write one checkpoint of each kind into folders of `root`; returns their names."""

    def saved(name: str, kind: str, **options: Any) -> Path:
        return save(root / name, kind, tokenizer, **options)

    # config.json says tied, and the files have a head of their own, a copy, or nothing else.
    head = torch.randn(384, 16, generator=torch.Generator().manual_seed(1))
    edit(saved("own head", "llama", **TIED), lambda t: {**t, HEAD: head})
    edit(saved("equal head", "llama", **TIED), lambda t: {**t, HEAD: t[EMBEDDING].clone()})
    edit(saved("only head", "llama", **TIED), lambda t: {HEAD: t.pop(EMBEDDING), **t})
    # Files with a weight for each expert, of which the model fuses them all.
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in tensors(
        saved("experts", "mixtral", **EXPERTS)
    )
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in tensors(
        saved("qwen experts", "qwen2_moe", **QWEN_EXPERTS)
    )
    assert "embed_out.weight" in tensors(saved("other head name", "gpt_neox"))
    # A model of text and pictures, under the older prefixes and those of the model itself.
    text = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}
    gemma = {"text_config": text, "vision_config": PICTURES, "mm_tokens_per_image": 1}
    gemma |= {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    older = saved("older prefixes", "gemma3", **gemma)
    assert "language_model.model.norm.weight" in tensors(older)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (older / file).write_text("{}")
    edit(saved("newer prefixes", "gemma3", **gemma), _with_newer_prefixes)
    return sorted(path.name for path in root.iterdir())


def _with_newer_prefixes(named: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in named.items():
        newer = name.replace("language_model.model.", "language_model.")
        renamed[f"model.{newer}"] = value
    return renamed
