"""Triton kernels for preference training: token log-probs, their scores, and KL, without logits.

Needs torch and triton alone. The formula and the memory cost of each operation head its file.
`BACKEND` is what `fastpref.ops` calls for `impl="triton"`; `missing` says where it cannot.
"""

from importlib.util import find_spec
from typing import Any

__all__ = ["BACKEND", "missing"]


def missing(device: str) -> str:
    """What keeps the kernels from running on a device and what helps; empty if nothing does."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed; pip install triton"
    import torch
    import triton

    if device == "cpu" and triton.knobs.runtime.interpret:
        return ""
    if device != "cuda":
        return (
            f"cannot run on {device}; move the inputs to a CUDA device, or set TRITON_INTERPRET=1 "
            f"before triton is imported to run it, slowly, on the CPU"
        )
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "is written for NVIDIA GPUs, and there is none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return ""


def __getattr__(name: str) -> Any:
    if name != "BACKEND":  # looked up late: importing it imports triton
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastpref_kernels.backend import BACKEND

    return BACKEND
