"""RMSNorm, rotary embedding and gated MLP of liger-kernel in the layers of a model.

liger-kernel patches the model and, for the rotary embedding, the transformers module of its
architecture, which affects every model of this architecture in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import has, require

OPTION = "model.kernels: liger"


def use_liger(causal_lm: PreTrainedModel, kernels: str, device: torch.device) -> bool:
    """Apply `model.kernels` ("auto", "liger" or "torch"); return whether layers were patched.

    Raises ModelError or MissingPackage if "liger" cannot be used.
    """
    kind = causal_lm.config.model_type
    if kernels == "auto":
        # liger-kernel does not compute in fp64.
        is_float64 = causal_lm.dtype == torch.float64
        available = device.type == "cuda" and has("liger-kernel") and not is_float64
        kernels = "liger" if available and _patch_of(kind) else "torch"
    if kernels == "torch":
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
    """Function of liger-kernel that patches an architecture, or None if there is none."""
    import liger_kernel.transformers as liger

    return getattr(liger, f"apply_liger_kernel_to_{kind}", None)
