"""Choice of the code that computes the decoder layers: `model.kernels`."""

from __future__ import annotations

import torch

from fastpref.config import Model, Training
from fastpref.model.liger import use_liger
from fastpref.model.policy import Policy
from fastpref.trunk import UnknownLayer, build_trunk
from fastpref.utils.errors import ModelError

OPTION = "model.kernels: fused"


def use_kernels(policy: Policy, model: Model, training: Training, device: torch.device) -> None:
    """Set `policy.trunk` or apply the layers of liger-kernel, as `model.kernels` says.

    Raises ModelError if "fused" cannot be used, and the errors of `use_liger`.
    """
    if model.kernels in ("auto", "fused"):
        reason = fuse(policy, model, training.compile)
        if not reason:
            return
        if model.kernels == "fused":
            raise ModelError(f"{OPTION}: {reason}; use auto or torch")
        policy.not_fused = reason
    if use_liger(policy.base, model.kernels, device):
        policy.kernels = "liger"


def fuse(policy: Policy, model: Model, compiled: bool) -> str:
    """Build the policy's trunk; return the reason why it cannot be built, empty if it was."""
    if model.attn_implementation != "auto":
        return f"model.attn_implementation is {model.attn_implementation}"
    if compiled:
        return "training.compile compiles the layers of transformers"
    try:
        policy.trunk = build_trunk(policy.base.base_model)
    except UnknownLayer as error:
        return str(error)
    policy.kernels = "fused"
    return ""
