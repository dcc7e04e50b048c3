"""Optimizers and learning rate schedules."""

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
    """Make the optimizer of the config; weight decay applies only to matrices.

    Raises ConfigError or MissingPackage if it cannot run on these parameters.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    check_eight_bit(config, parameters[0].device)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ConfigError(
            f"optim.name: {config.name} needs full weights, and these are sharded over the "
            "ranks; use adamw, or train an adapter"
        )
    return _eight_bit_class(paged=config.name.startswith("paged"))(groups, **options)


def check_eight_bit(config: Optim, device: torch.device) -> None:
    """Raise ConfigError or MissingPackage for an 8-bit optimizer that this device cannot run."""
    if not config.name.endswith("8bit"):
        return
    require("bitsandbytes", f"optim.name: {config.name}")
    if config.name.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"optim.name: {config.name} pages the memory of a GPU, and the device is "
            f"{device.type}; use adamw_8bit"
        )


class _TensorState:
    """Mixin for bitsandbytes optimizers: the state holds only tensors, for loading in place.

    The quantization tables are left out of it; they are constant and shared by all parameters.
    """

    state: dict[nn.Parameter, dict[str, Tensor]]

    def init_state(self, group: Any, p: nn.Parameter, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)  # type: ignore[misc]
        self.state[p]["step"] = torch.tensor(0)

    def state_dict(self) -> dict[str, Any]:
        full_state = torch.optim.Optimizer.state_dict(self)  # type: ignore[arg-type]
        tables = ("qmap1", "qmap2")
        state = {
            index: {name: t for name, t in entry.items() if name not in tables}
            for index, entry in full_state["state"].items()
        }
        return {**full_state, "state": state}


def _eight_bit_class(paged: bool) -> type[torch.optim.Optimizer]:
    from bitsandbytes import optim

    base = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    # The name is stored in checkpoints.
    return type(base.__name__, (_TensorState, base), {})


def warmup_advice(config: Optim, steps: int) -> str | None:
    """Note about a warm-up that lasts as long as the run, or longer; None for a shorter one."""
    warmup = config.warmup(steps)
    if warmup < max(steps, 2):
        return None
    return (
        f"note: the warm-up takes {warmup:,} steps and the run has {steps:,}, so the learning rate "
        f"only grows, to {config.lr * min(1, steps / warmup):.3g}; lower optim.warmup_steps"
    )


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Learning rate of `step`, counted from 0, of `steps`: linear warm-up, then the schedule."""
    warmup = config.warmup(steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr
