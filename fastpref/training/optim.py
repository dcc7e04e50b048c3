"""Optimizers and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastpref.config import ConfigError, Optim
from fastpref.utils.optional_packages import require


def make_optimizer(config: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the config over the parameters; only matrices decay.

    Raises ConfigError or MissingPackage for one that cannot run on them.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    check_eight_bit(config, trained[0].device)
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise ConfigError(
            f"optim.name: {config.name} works on whole weights, and these are sharded over the "
            "ranks; use adamw, or train an adapter"
        )
    return _eight_bit(paged=config.name.startswith("paged"))(groups, **options)


def check_eight_bit(config: Optim, device: torch.device) -> None:
    """Raises ConfigError or MissingPackage for an 8-bit optimizer that this device cannot run."""
    if not config.name.endswith("8bit"):
        return
    require("bitsandbytes", f"optim.name: {config.name}")
    if config.name.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"optim.name: {config.name} pages the memory of a GPU, and this is {device.type}; "
            "use adamw_8bit"
        )


class _PlainState:
    """Of a bitsandbytes optimizer: state in tensors alone, which checkpoints fill in place.

    The tables of what a byte stands for are left out; parameters share them, and they never change.
    """

    state: dict[nn.Parameter, dict[str, Tensor]]

    def init_state(self, group: Any, p: nn.Parameter, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)  # type: ignore[misc]
        self.state[p]["step"] = torch.tensor(0)

    def state_dict(self) -> dict[str, Any]:
        made = torch.optim.Optimizer.state_dict(self)  # type: ignore[arg-type]
        tables = ("qmap1", "qmap2")
        state = {
            index: {name: t for name, t in entry.items() if name not in tables}
            for index, entry in made["state"].items()
        }
        return {**made, "state": state}


def _eight_bit(paged: bool) -> type[torch.optim.Optimizer]:
    from bitsandbytes import optim

    kind = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    return type(kind.__name__, (_PlainState, kind), {})


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 0, of `steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1.0 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr
