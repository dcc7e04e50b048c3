"""Tiny models, batches of pairs, and DPO's loss on full logits in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
Batch = dict[str, Tensor]


def tiny(kind: str = "llama", **options: Any) -> Any:
    """A causal language model with random weights; the same ones for the same arguments."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY | options)
    return AutoModelForCausalLM.from_config(config)


def reference_of(model: nn.Module) -> Any:
    """A copy with other weights."""
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return reference


def pairs(seed: int = 0) -> Batch:
    """Two pairs of nine tokens, one sequence with padding; prompts of three tokens."""
    ids = torch.randint(2, 384, (4, 9), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[1, 7:] = 0
    labels[:, :3] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def joint(first: Batch, second: Batch) -> Batch:
    """The pairs of two batches in one."""
    return {
        name: torch.cat(
            [*(x.chunk(2)[side] for side in (0, 1) for x in (first[name], second[name]))]
        )
        for name in first
    }


def full_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Summed log-prob (S,) of each sequence, from the model's logits."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    labels = batch["labels"][:, 1:]
    logps = output.logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(1)


def full_dpo(logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """DPO's loss () of summed log-probs (2B,)."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each trainable parameter that has one."""
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def steps(
    model: nn.Module, loss_of: Callable[[Batch], Tensor], batches: list[Batch]
) -> list[float]:
    """Losses of steps of SGD, one a batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
