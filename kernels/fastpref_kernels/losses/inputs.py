"""Argument checks and arithmetic that the two loss kernels share."""

# mypy: allow-untyped-defs
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels import unavailable_reason
from fastpref_kernels.common.configs import RowConfig

LOSSES = RowConfig(128, 4)


LENGTH_DTYPES = (torch.int32, torch.int64)


@triton.jit
def hyperparameters(p0, p1, p2, p3, COUNT: tl.constexpr, dtype: tl.constexpr):
    """The first COUNT numbers in the dtype of the log-probs."""
    return (
        tl.full((1,), p0, dtype), tl.full((1,), p1, dtype),
        tl.full((1,), p2, dtype), tl.full((1,), p3, dtype),
    )[:COUNT]  # fmt: skip


@triton.jit
def added(sums, values, mask):
    """Add the values of each column to its sums, lane by lane."""
    result = ()
    for i in tl.static_range(len(values)):
        column = tl.where(mask, values[i], 0.0).to(tl.float64)
        result += (sums[i] + column,)  # type: ignore[assignment]
    return result


def padded(values: list[Any], length: int, filler: Any) -> list[Any]:
    """The values, followed by fillers up to `length`."""
    return values + [filler] * (length - len(values))


def required(argument: str, tensor: Tensor | None, name: str) -> Tensor:
    """Return the tensor; raise ValueError if it is None."""
    if tensor is None:
        raise ValueError(f"{argument}: {name} needs it, got None")
    return tensor


def check_log_probs(argument: str, logps: Tensor) -> None:
    """Raise ValueError unless the kernels can read the vector of log-probs."""
    if logps.dim() != 1:
        raise ValueError(f"{argument}: expected one log-prob each, got {tuple(logps.shape)}")
    if logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{argument}: expected float32 or float64, got {logps.dtype}: sum in float32"
        )
    if reason := unavailable_reason(logps.device.type):
        raise ValueError(f"{argument}: the kernel {reason}")


def check_point(logps: Tensor, reference_point: Tensor) -> None:
    """Raise ValueError unless the point is one floating-point number on the log-probs' device."""
    if reference_point.shape != () or not reference_point.is_floating_point():
        raise ValueError(
            f"reference_point: expected one floating-point number of shape (), got "
            f"{tuple(reference_point.shape)} in {reference_point.dtype}"
        )
    if reference_point.device != logps.device:
        raise ValueError(
            f"reference_point: expected device {logps.device} like logps, got "
            f"{reference_point.device}: move it"
        )


def check_vectors(
    first: str,
    logps: Tensor,
    others: Mapping[str, Tensor | None],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise ValueError unless each tensor matches the log-probs and has one of the dtypes."""
    for argument, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != logps.shape:
            raise ValueError(
                f"{argument}: expected {tuple(logps.shape)} like {first}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{argument}: expected {expected}, got {tensor.dtype}: cast it")
        if tensor.device != logps.device:
            raise ValueError(
                f"{argument}: expected device {logps.device} like {first}, got {tensor.device}: "
                "move it"
            )
