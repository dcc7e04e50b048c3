"""Tests that were written for a GPU, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
_GEMMS = (
    torch.matmul,
    torch.mm,
    torch.nn.functional.linear,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)


class OnCpu(TorchFunctionMode):
    """Mode in which "cuda" is the CPU, and GEMMs of half precision are computed in fp32.

    Their results are rounded once, as on a GPU, which also accumulates in fp32; a CPU without bf16
    units takes hundreds of times as long for a bf16 GEMM.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if "device" in options and torch.device(options["device"] or "cpu").type == "cuda":
            options["device"] = "cpu"
        if func in _GEMMS and args[0].dtype in _HALF:
            wide = [x.float() if isinstance(x, Tensor) else x for x in args]
            product: Tensor = func(*wide, **options)
            return product.to(args[0].dtype)
        return func(*args, **options)
