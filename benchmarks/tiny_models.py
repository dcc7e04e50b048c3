"""Tiny models of every causal architecture of transformers, with weights in which a leak shows."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
WINDOW = 12
MOST_PARAMETERS = 3_000_000
STD = 0.15  # of weights: attention and experts differ between tokens, which they hardly do at 0.02

# Values of config entries whose whole name matches; the first match counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|dim|embed_dim", 32),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp)?|d_ff|d_inner|n_inner|dim_ff", 48),
    (r"encoder_layers", 2),
    (r"num_mem_blocks|num_kv_shared_layers|num_nextn_predict_layers|first_k_dense_replace", 1),
    (r"num_key_value_heads|n_head_kv|num_kv_heads|multi_query_group_num", 2),
    (r"(num_attention_heads|n_head|n_heads|decoder_attention_heads|encoder_attention_heads)", 4),
    (r"head_dim|global_head_dim|d_kv|v_head_dim|qk_nope_head_dim|qk_rope_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"(num|n)_(local_|routed_)?experts", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|top_k_experts|moe_top_k|top_k)", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length", 128),
    (r"sliding_window|attention_window_size|window_size|local_attention", WINDOW),
    (r"attention_chunk_size", 16),
    (r"(mamba_)?(d_state|n_state|state_size)|ssm_state_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"(mamba_)?chunk_size|mamba_chunk_size|block_size", 8),
    (r"linear_num_key_heads|linear_num_value_heads", 2),
    (r"linear_key_head_dim|linear_value_head_dim", 8),
    (r"lru_width|attention_hidden_size|conv_dim", 32),
    (r"time_step_rank|mamba_dt_rank|dt_rank", 4),
    (r"rotary_dim", 4),
    (r"index_n_heads|indexer_num_heads|indexer_n_heads", 2),
    (r"index_head_dim|indexer_head_dim", 8),
    (r"index_topk|indexer_top_k|keep_window_size", 1024),
)  # fmt: skip
# Sizes of entries that are None by default, and that the models need.
_WHERE_UNSET = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
# Entries that the patterns do not fit, by architecture.
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"num_heads": 4, "chunk_size": 16},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"pad_token_id": 0},
}
# Models beside those with the defaults of their architecture.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, LongRoPE": ("phi3", {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 24,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0],
        },
    }),
    "llama, dynamic NTK": ("llama", {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    }),
    "llama, YaRN": ("llama", {
        "max_position_embeddings": 24,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    }),
}  # fmt: skip


def names() -> list[str]:
    """Causal architectures of transformers, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_config(name: str) -> Any:
    """Hugging Face config of a tiny model; raises whatever transformers raises."""
    from transformers import AutoConfig

    kind, changes = VARIANTS.get(name, (name, {}))
    default = AutoConfig.for_model(kind)
    values = _shrunk(default.to_dict())
    values |= _OF_ARCHITECTURE.get(kind, {}) | changes
    config = AutoConfig.for_model(kind, **values)
    for entry, value in values.items():  # setters of a config may overwrite one another
        # Gemma 4 refuses to read entries that differ between layers.
        with suppress(AttributeError, ValueError):
            if isinstance(value, int) and getattr(config, entry, None) != value:
                setattr(config, entry, value)
    return config


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Entries that make a config small, without those that describe single layers."""
    layers = next((n for k, n in values.items() if k in _LAYERS and isinstance(n, int)), None)
    of_layers = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers}
    of_layers = {k: v for k, v in of_layers.items() if v != [*range(len(v))]}  # numbers of layers
    count = max([2, *(len(_kinds(kinds)) for kinds in of_layers.values())])
    small: dict[str, Any] = {k: _all_kinds(v, count) for k, v in of_layers.items()}
    for entry, value in values.items():
        if isinstance(value, dict) and entry.endswith("text_config"):
            small[entry] = {"model_type": value.get("model_type"), **_shrunk(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for form, n in _SIZES if re.fullmatch(form, entry)), None)
            if entry in _LAYERS:
                small[entry] = count
            elif size is not None and value > 0:
                small[entry] = size
            elif entry.endswith("token_id"):
                small[entry] = min(value, 2)
    unset = {entry for entry, value in values.items() if value is None}
    small |= {entry: size for entry, size in _WHERE_UNSET.items() if entry in unset}
    if "kv_lora_rank" in small:  # the heads of latent attention have keys of their own
        small["num_key_value_heads"] = small["num_attention_heads"]
    if small.get("sliding_window") == WINDOW and "use_sliding_window" in values:
        small["use_sliding_window"] = True
    return small


_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")


def _kinds(layers: list[Any]) -> list[Any]:
    """Kinds of layers in the order of their first layer."""
    return [kind for index, kind in enumerate(layers) if kind not in layers[:index]]


def _all_kinds(layers: list[Any], count: int) -> list[Any]:
    """A list for `count` layers, with one of each kind."""
    kinds = _kinds(layers)
    return [*kinds, *[kinds[-1]] * (count - len(kinds))]


def build(name: str, vocabulary: int = VOCABULARY) -> nn.Module:
    """Tiny model in fp32 with random weights of standard deviation STD."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    config.get_text_config().vocab_size = vocabulary
    for entry, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in entry or entry.endswith("_pdrop")):
            setattr(config, entry, 0.0)
    torch.manual_seed(0)
    size = _parameters(config)
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters after shrinking")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _widen(model)
    return model.eval()


def _parameters(config: Any) -> int:
    """Number of parameters; 0 for a model that cannot be built without its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except TypeError:
        return 0


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Scale the weights of matrices to a standard deviation of at least STD."""
    for module in model.modules():
        is_matrix = isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d)
        for weight in module.parameters(recurse=False):
            if weight.dim() >= 2 and (is_matrix or weight.dim() == 3):
                spread = weight.std().item()
                if 0 < spread < STD:
                    weight.mul_(STD / spread)
