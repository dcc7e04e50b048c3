"""RMSNorm, rotary embedding and gated MLP of liger-kernel in the layers of a model.

liger-kernel puts its functions into the model and, for the rotary embedding, into the transformers
module of its architecture: they then serve every model of this architecture in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import has, require

OPTION = "model.kernels: liger"


def use_liger(causal_lm: PreTrainedModel, asked: str, device: torch.device) -> bool:
    """Do as `model.kernels` asks, and say whether the layers are liger-kernel's now.

    Raises ModelError, or MissingPackage, where `liger` is asked for by name and cannot be had.
    """
    kind = causal_lm.config.model_type
    if asked == "auto":
        float64 = causal_lm.dtype == torch.float64  # which its kernels do not compute in
        usable = device.type == "cuda" and has("liger-kernel") and not float64
        asked = "liger" if usable and _patch_of(kind) else "torch"
    if asked == "torch":
        return False
    if device.type != "cuda":
        raise ModelError(f"{OPTION} runs on CUDA, and this is {device.type}; use auto or torch")
    require("liger-kernel", OPTION)
    patch = _patch_of(kind)
    if patch is None:
        raise ModelError(f"{OPTION} does not know models of type {kind}; use auto or torch")
    patch(model=causal_lm, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def _patch_of(kind: str) -> Callable[..., Any] | None:
    """liger-kernel's own function for an architecture."""
    import liger_kernel.transformers as liger

    return getattr(liger, f"apply_liger_kernel_to_{kind}", None)
