"""Tiny models that compare two answers, in the layout of PairRM, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
_SIZE, _TASKS = 16, 2


def write_pair_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **more: Any) -> str:
    """Write a model and its tokenizer; more: fields of the config."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_saved(tokenizer, folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(PREFIXES)})
    tokenizer.save_pretrained(folder)
    source, first, second = map(tokenizer.convert_tokens_to_ids, PREFIXES)
    ids = {"source_prefix_id": source, "cand1_prefix_id": first, "cand2_prefix_id": second}
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        **{**ids, "n_tasks": _TASKS, "drop_out": 0.05, **more},
    )
    config.architectures = more.get("architectures", ["DebertaV2PairRM"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    encoder = DebertaV2Model(config).state_dict()
    weights = {f"pretrained_model.{name}": value.clone() for name, value in encoder.items()}
    for name, rows, columns in (("1", _SIZE, 2 * _SIZE), ("4", _TASKS, _SIZE)):
        weights[f"head_layer.{name}.weight"] = torch.randn(rows, columns)
        weights[f"head_layer.{name}.bias"] = torch.randn(rows)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@torch.no_grad()
def plain_logit(folder: str, prompt: str, first: str, second: str) -> float:
    """Log-odds that the first answer is the better one, step by step, without a batch."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = zip(PREFIXES, (prompt, first, second), strict=True)
    ids = torch.tensor([i for prefix, text in texts for i in tokenizer.encode(prefix + text)])
    weights = load_file(f"{folder}/model.safetensors")
    encoder = DebertaV2Model(DebertaV2Config.from_pretrained(folder)).eval()
    start = "pretrained_model."
    encoder.load_state_dict(
        {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
    )
    hidden = encoder(ids[None]).last_hidden_state[0]
    source, left, right = (
        hidden[ids == tokenizer.convert_tokens_to_ids(prefix)][0] for prefix in PREFIXES
    )

    def head(state: Tensor) -> Tensor:
        inner = weights["head_layer.1.weight"] @ torch.cat([source, state])
        inner = torch.tanh(inner + weights["head_layer.1.bias"])
        return weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]

    return float((head(left) - head(right)).mean())


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder
