"""Hugging Face's layers in fp64 throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ExactlyInFp64(TorchFunctionMode):
    """Leaves out the casts to fp32 by which Hugging Face's layers round fp64 inputs."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if is_wide and function is Tensor.float:
            return args[0]
        if is_wide and function is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
            return args[0]
        if is_wide and function is nn.functional.softmax:
            kwargs.pop("dtype", None)
        return function(*args, **kwargs)
