"""Models and data sets that stand in for those which TRL's tests load from the Hub.

They lie in folders with the names that they have there, so a process in the folder above loads
them. Models have random weights, data sets a few rows of made-up text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import tiny_models
from fastpref.data import bpe

OWNER = "trl-internal-testing"
# Causal models by the architecture of transformers that each is an instance of.
MODELS = {
    "tiny-Cohere2ForCausalLM": "cohere2",
    "tiny-Glm4MoeForCausalLM": "glm4_moe",
    "tiny-GptOssForCausalLM": "gpt_oss",
    "tiny-Lfm2ForCausalLM": "lfm2",
    "tiny-Lfm2ForCausalLM-2.5": "lfm2",
    "tiny-LlamaForCausalLM-3.2": "llama",
    "tiny-NemotronHForCausalLM-nano": "nemotron_h",
    "tiny-OPTForCausalLM": "opt",
    "tiny-Olmo3ForCausalLM": "olmo3",
    "tiny-Phi3ForCausalLM-3": "phi3",
    "tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "tiny-Qwen3MoeForCausalLM": "qwen3_moe",
}
REMOTE = "tiny-RemoteForCausalLM"  # with code of its own
ENCODER_DECODER = "tiny-T5ForConditionalGeneration"
VOCABULARY = 400
_ROWS = {"train": 17, "test": 2}
_WORDS = "beautiful explicit simple complex flat sparse readable special practical silent".split()  # noqa: SIM905


def make(folder: Path) -> None:
    """Write all models and data sets below `folder`."""
    home = folder / OWNER
    made = tokenizer()
    for name, architecture in MODELS.items():
        _save(tiny_models.build(architecture, VOCABULARY), made, home / name)
    _save(_encoder_decoder(), made, home / ENCODER_DECODER)
    _remote(made, home / REMOTE)
    _data(home / "zen", _ZEN)
    _data(home / "harmony", {"preference": _conversation})
    _data(home / "toolcall", {"preference": _tool_call})


def tokenizer() -> Any:
    """Tokenizer of all models."""
    texts = [text for i in range(40) for text in _texts(i)]
    return bpe.train(texts, VOCABULARY - 8)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )  # fmt: skip
    config.decoder_start_token_id = 2
    return T5ForConditionalGeneration(config)


def _remote(tokenizer: Any, folder: Path) -> None:
    """A Llama whose classes come with the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    _save(LlamaForCausalLM(config), tokenizer, folder)
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "remote.RemoteConfig",
            "AutoModelForCausalLM": "remote.RemoteForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def _data(folder: Path, configs: dict[str, Callable[[int], dict[str, Any]]]) -> None:
    """JSON lines for each config and split, and the card that names them."""
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for name, row in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, count in _ROWS.items():
            file = f"{name}/{split}.jsonl"
            lines = [json.dumps(row(i)) for i in range(count)]
            (folder / name).mkdir(exist_ok=True)
            (folder / file).write_text("\n".join(lines) + "\n")
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def _texts(i: int) -> tuple[str, str, str]:
    """Prompt and two responses."""
    word, other = _WORDS[i % 10], _WORDS[(3 * i + 1) % 10]
    return (
        f"{i}. Which is better, {word} or",
        f" {other}" + f" and {word}" * (i % 3) + ".",
        f" {word} in spite of the {other} rest" + " of it" * (i % 4) + ".",
    )


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def standard(i: int) -> dict[str, Any]:
    """A pair without roles."""
    prompt, chosen, rejected = _texts(i)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(i: int) -> dict[str, Any]:
    prompt, chosen, rejected = _texts(i)
    return {
        "prompt": _message("user", prompt),
        "chosen": _message("assistant", chosen),
        "rejected": _message("assistant", rejected),
    }


def _standard_implicit(i: int) -> dict[str, Any]:
    prompt, chosen, rejected = _texts(i)
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def _conversation_implicit(i: int) -> dict[str, Any]:
    row = _conversation(i)
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def _unpaired(i: int) -> dict[str, Any]:
    row = standard(i)
    return {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}


def _conversation_unpaired(i: int) -> dict[str, Any]:
    row = _conversation(i)
    return {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}


def _tool_call(i: int) -> dict[str, Any]:
    return {**_conversation(i), "tools": []}


_ZEN: dict[str, Callable[[int], dict[str, Any]]] = {
    "standard_preference": standard,
    "conversational_preference": _conversation,
    "standard_implicit_prompt_preference": _standard_implicit,
    "conversational_implicit_prompt_preference": _conversation_implicit,
    "standard_unpaired_preference": _unpaired,
    "conversational_unpaired_preference": _conversation_unpaired,
}
