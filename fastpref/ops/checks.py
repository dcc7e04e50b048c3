"""Checks of the arguments of the ops: shapes, dtypes and devices, by name.

Each raises ValueError. `fastpref.ops.bounds` checks values, which a GPU would have to be read for.
"""

import math

import torch
from torch import Tensor

from fastpref.ops.backend import Head

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def check_head(
    hidden: Tensor, head: Head, prefix: str = "", *, rounds_parameters: bool = False
) -> None:
    """Check hidden states and the head that they go through.

    rounds_parameters: whether the op takes a weight and bias of fp32 under autocast.
    """
    weight, bias, logit_scale, softcap = head
    hidden_name, weight_name = f"{prefix}hidden", f"{prefix}weight"
    check_plain(hidden_name, hidden)
    check_gathered(weight_name, weight)
    check_gathered("bias", bias)
    if hidden.dim() != 2 or hidden.dtype not in _FLOATS:
        raise ValueError(
            f"{hidden_name}: expected a (T, D) tensor of fp16, bf16, fp32 or fp64, "
            f"got {describe(hidden)}; flatten batch and time into T"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(
            f"{weight_name}: expected shape (V, {hidden.shape[1]}) with V >= 1 to match "
            f"{hidden_name}, got {tuple(weight.shape)}"
        )
    rounds = rounds_parameters and _is_autocast(hidden)
    if not (rounds and weight.dtype == torch.float32):
        _check_dtype(weight_name, weight, hidden, hidden_name)
    check_device(weight_name, weight, hidden, hidden_name)
    if bias is not None:
        if bias.shape != (len(weight),):
            raise ValueError(
                f"bias: expected shape ({len(weight)},), one per row of weight, "
                f"got {tuple(bias.shape)}"
            )
        if not (rounds and bias.dtype == torch.float32):
            _check_dtype("bias", bias, hidden)
        check_device("bias", bias, hidden)
    if not _is_real(logit_scale) or logit_scale == 0:
        raise ValueError(
            f"logit_scale: expected a finite number other than 0, got {logit_scale!r}; "
            f"1.0 leaves the logits as they are"
        )
    if softcap is not None and not (_is_real(softcap) and softcap > 0):
        raise ValueError(
            f"softcap: expected a finite number above 0, got {softcap!r}; None means no cap"
        )


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    check_plain("labels", labels)
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"labels: expected int64 or int32, got {labels.dtype}")
    if labels.shape != (len(hidden),):
        raise ValueError(
            f"labels: expected shape ({len(hidden)},), one per row of hidden, "
            f"got {tuple(labels.shape)}"
        )
    check_device("labels", labels, hidden)


def check_weights(token_weights: Tensor, hidden: Tensor) -> None:
    check_plain("token_weights", token_weights)
    if token_weights.shape != (len(hidden),) or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights: expected floating point of shape ({len(hidden)},), one per row of "
            f"hidden, got {describe(token_weights)}"
        )
    check_device("token_weights", token_weights, hidden)


def check_offsets(offsets: Tensor, items: Tensor, name: str = "cu_seqlens") -> None:
    check_plain(name, offsets)
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in _INTEGERS:
        raise ValueError(
            f"{name}: expected an int32 or int64 vector of offsets starting at 0, "
            f"got {describe(offsets)}"
        )
    check_device(name, offsets, items, "what they count")


def _check_dtype(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype} like {like_name}, got {tensor.dtype}; cast one of them"
        )


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected to be on {like.device} like {like_name}, got {tensor.device}; "
            f"move one of them"
        )


def check_gathered(name: str, parameter: Tensor | None) -> None:
    """Raise ValueError for a sharded parameter."""
    if _is_sharded(parameter):
        raise ValueError(
            f"{name}: got a DTensor, of which this rank holds a shard; call the op inside the "
            f"forward of the FSDP module that owns it, where it is gathered"
        )


def check_plain(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError for a DTensor that is no parameter."""
    if _is_sharded(tensor):
        raise ValueError(
            f"{name}: got a DTensor, of which this rank holds a shard; pass its full_tensor(), or "
            f"its to_local() where each rank has tokens of its own"
        )


def _is_sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "device_mesh")


def _is_autocast(hidden: Tensor) -> bool:
    """Whether autocast is on, and would cast to the dtype that the hidden states have."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return hidden.dtype == torch.get_autocast_dtype(device)


def _is_real(number: object) -> bool:
    # math.isfinite would read a symbol of torch.compile.
    return isinstance(number, int | float) and abs(number) < math.inf


def describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}"
