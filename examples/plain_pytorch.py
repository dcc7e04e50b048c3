"""Preference training in a plain PyTorch loop: any objective, no logits.

    python examples/plain_pytorch.py                         # a tiny random model, seconds on a CPU
    torchrun --nproc-per-node 2 examples/plain_pytorch.py        # on several devices or processes
    python examples/plain_pytorch.py --loss stapo --steps 50     # or tdpo2, or bco
    python examples/plain_pytorch.py --model Qwen/Qwen2.5-0.5B --lr 1e-6

The data are generated: replace `pairs` by your own prompt, chosen and rejected texts. For an
objective on single responses the pairs are split. kto, ti_dpo and the objectives on groups need
more arguments: see docs/integrations.md.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.data import bpe
from fastpref.fused import ModelLoss
from fastpref.losses import PointwiseLoss

WORDS = "tea coffee river mountain piano guitar winter summer bread cheese".split()  # noqa: SIM905


def pairs(count: int) -> list[dict[str, str]]:
    """Questions with two answers; the alphabetically first one is preferred."""
    rows = []
    for i in range(count):
        first, second = sorted((WORDS[i % 10], WORDS[(3 * i + 1) % 10]))
        prompt = f"User: {second} or {first}?\nAssistant:"
        rows.append({"prompt": prompt, "chosen": f" {first}", "rejected": f" {second}, please"})
    return rows


def load(path: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer; without a path, tiny random ones."""
    if path is not None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer
    torch.manual_seed(0)
    tokenizer = bpe.train((text for pair in pairs(40) for text in pair.values()), 384)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def collate(batch: Sequence[dict[str, str]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """All chosen and then all rejected sequences, padded; only responses have labels."""
    ids, labels = [], []
    for response in ("chosen", "rejected"):
        for pair in batch:
            prompt = tokenizer(pair["prompt"])["input_ids"]
            whole = tokenizer(pair["prompt"] + pair[response] + tokenizer.eos_token)["input_ids"]
            ids.append(torch.tensor(whole))
            labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
    mask = [torch.ones_like(x) for x in ids]
    columns = {"input_ids": (ids, tokenizer.pad_token_id), "labels": (labels, -100)}
    columns["attention_mask"] = (mask, 0)
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        for name, (values, padding) in columns.items()
    }


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and return the loss of each step."""
    parser = argparse.ArgumentParser(description="Preference training in a plain PyTorch loop.")
    parser.add_argument("--model", help="folder or Hub name; a tiny random model by default")
    parser.add_argument("--loss", default="dpo", help="one of `fastpref losses`")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model, tokenizer = load(options.model)
    model.to(device)
    reference = copy.deepcopy(model).requires_grad_(False)
    preference_loss = ModelLoss(model, options.loss, reference=reference)
    wrapper = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    given = {}
    if isinstance(preference_loss.objective, PointwiseLoss):  # the chosen responses come first
        given["desirable"] = torch.arange(16) < 8
    data, losses = pairs(64), []
    for step in range(options.steps):
        first = 8 * (ranks * step + rank)  # each rank has pairs of its own
        batch = collate([data[(first + i) % len(data)] for i in range(8)], tokenizer)
        loss, metrics = preference_loss(
            wrapper, input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device), labels=batch["labels"], **given,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0:
            print(f"step {step + 1:3d}  loss {losses[-1]:.4f}  "
                  f"accuracy {metrics['rewards/accuracies'].item():.2f}  "
                  f"margin {metrics['rewards/margins'].item():+.3f}")  # fmt: skip
    return losses


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
