"""Shapes of public models, as in their Hugging Face configs, so that plans download nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.plans import by_hardware

Shape = dict[str, Any]

_LLAMA_3_8B = by_hardware.SHAPES["meta-llama/Meta-Llama-3-8B-Instruct"]
_LLAMA_32_1B: Shape = {
    **_LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_LLAMA_7B: Shape = {
    **_LLAMA_3_8B,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_7B: Shape = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_QWEN_25_7B: Shape = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_GEMMA_2_9B: Shape = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
_OLMO_3_7B: Shape = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 65536,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
_SMOLLM3_3B: Shape = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
_DEMO: Shape = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def _pythia(width: int, layers: int, heads: int, vocabulary: int) -> Shape:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


# By Hub name, or by the folder into which an earlier config or command writes the model.
SHAPES: dict[str, Shape] = {
    **by_hardware.SHAPES,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA_3_8B,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": {**_LLAMA_3_8B, "vocab_size": 128264},
    "ContextualAI/archangel_sft_llama7b": _LLAMA_7B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": {**_MISTRAL_7B, "vocab_size": 32768},
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "runs/papers/did-sft-mistral-7b/model": {**_MISTRAL_7B, "vocab_size": 32768},
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_25_7B,
    "google/gemma-2-9b-it": _GEMMA_2_9B,
    "runs/papers/did-sft-gemma-2-9b/model": _GEMMA_2_9B,
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16, 50304),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32, 50304),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "runs/papers/pro-hh-sft/model": _pythia(4096, 32, 32, 50432),
    "allenai/Olmo-3-7B-Instruct-SFT": _OLMO_3_7B,
    "allenai/Olmo-3-7B-Think-SFT": _OLMO_3_7B,
    "models/smollm3-3b-sft": _SMOLLM3_3B,
    "runs/demo/sft/model": _DEMO,
}
