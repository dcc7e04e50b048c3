"""The choice between Triton kernels and plain PyTorch for elementwise operations.

PyTorch is the specification. The kernels run for half and single precision on CUDA.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_for(x: Tensor) -> Any | None:
    """Module of the kernels that take such a tensor; None where PyTorch computes."""
    return _kernels() if x.is_cuda and x.dtype in _DTYPES else None


@cache
def _kernels() -> Any | None:
    if import_module("fastpref_kernels").unavailable_reason("cuda"):
        return None
    return import_module("fastpref_kernels.trunk")
