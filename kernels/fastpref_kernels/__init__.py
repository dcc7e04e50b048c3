"""Triton kernels for preference training: token log-probs, their scores, and KL, without logits.

The package depends only on torch and triton. Each file begins with the formula and the memory cost
of its operation. `fastpref.ops` calls `BACKEND` for `impl="triton"`; `unavailable_reason` says why
it cannot run on a device.
"""

from importlib.util import find_spec
from typing import Any

__all__ = ["BACKEND", "unavailable_reason"]


def unavailable_reason(device: str) -> str:
    """Reason why the kernels cannot run on a device, and what would help; empty if they can."""
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
    if name != "BACKEND":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Importing the backend imports triton, which callers of unavailable_reason may not have.
    from fastpref_kernels.backend import BACKEND

    return BACKEND
